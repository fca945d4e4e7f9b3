"""Models: GGUF files, Hugging Face directories and hub repositories, and how one becomes the other."""
