"""Requests of tasks, computed in the worker: likelihoods of texts, and generated ones."""
