"""Tasks of lm-evaluation-harness on source and levels, and what their outcomes say."""
