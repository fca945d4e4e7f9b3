"""The engine inside llama-cpp-python. The child process (``__main__`` and what it imports) alone loads native code."""
