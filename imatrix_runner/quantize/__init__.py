"""Levels: plan each one on a given model, make them, and verify that a written file is what was planned."""
