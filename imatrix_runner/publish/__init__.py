"""Publishing: what is checked and decided before files are uploaded."""
