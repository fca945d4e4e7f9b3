"""Calibration: the text whose activations are measured."""
