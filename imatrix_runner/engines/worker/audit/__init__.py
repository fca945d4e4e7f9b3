"""Comparing quantised files with what llama-quantize makes of their source."""
