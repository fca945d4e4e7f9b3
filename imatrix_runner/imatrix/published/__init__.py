"""Published imatrices: who publishes them, finding one for a model, and fetching it."""
