"""Answers to prompts, in the worker."""
