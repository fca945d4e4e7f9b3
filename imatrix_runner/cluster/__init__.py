"""Work spread over the machines of a Ray cluster, with the bytes of one machine."""
