"""Mixes: the type of each tensor chosen by measured cost, for a size, a KLD or a memory budget."""
