"""Importance matrices: the value, its file formats, and how one is collected."""
