"""Jobs that measure how fast a model runs."""
