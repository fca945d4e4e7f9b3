"""The child process of the embedded engine, the only place with ctypes and llama_cpp."""
