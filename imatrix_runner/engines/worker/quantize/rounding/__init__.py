"""Rounding that writes other bytes than llama-quantize: refined searches and error feedback."""
