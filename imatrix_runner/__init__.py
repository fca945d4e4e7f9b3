"""imatrix-runner: importance matrices and quantised GGUF files in one command."""

__version__ = "0.1.0"
