"""Other people's files and one's own: whether their bytes are those that llama-quantize makes of their source."""
