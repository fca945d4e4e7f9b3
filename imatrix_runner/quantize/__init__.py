"""Levels: which there are, what each becomes on a given model, and whether a written file is what was planned."""
