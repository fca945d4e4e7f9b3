"""The engine that runs llama.cpp's own programs."""
