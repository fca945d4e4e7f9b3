"""Chat templates and tokenizer configurations, and rendering conversations with them in a sandboxed child."""
