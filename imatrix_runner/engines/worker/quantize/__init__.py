"""Dry runs, the single pass and the check of finished levels, in the worker."""
