"""Which levels fit a machine, how long an imatrix takes, and whether a text suits a model."""
