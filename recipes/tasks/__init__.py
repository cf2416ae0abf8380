"""Tasks that turn annotated rows into instructions while training."""
