"""Public calibration texts: their catalogue, and downloads into the cache."""
