"""Commands, one module each: its options and what it prints."""
