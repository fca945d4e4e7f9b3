"""Inspection of a text: size, languages, duplicates, tokens, and its overlap with another text."""
