"""The engine that drives llama.cpp's own programs: argument lists down, parsed lines up."""
