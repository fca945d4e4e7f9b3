"""Models: GGUF files, Hugging Face directories and hub repositories, with download and conversion."""
