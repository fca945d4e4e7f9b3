"""The options and the output of llama.cpp's programs; used by both engines."""
