"""Reference log-probabilities, and the comparison of a level with them, in the worker."""
