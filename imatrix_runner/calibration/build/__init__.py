"""Building a calibration text from documents, by weight and up to a budget."""
