"""Tasks that convert annotated rows to instructions during training."""
