"""The parent's side of the engine that uses llama-cpp-python. Only its worker process loads native code."""
