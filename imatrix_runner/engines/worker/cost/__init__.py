"""What rounding tensors costs, in the worker: errors of their numbers, and trials in the loaded model."""
