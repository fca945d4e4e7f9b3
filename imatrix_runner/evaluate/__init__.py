"""Measuring what quantisation costs: divergence from the source, and what follows from it."""
