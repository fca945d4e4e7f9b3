"""Collection of activations for an imatrix, in the worker."""
