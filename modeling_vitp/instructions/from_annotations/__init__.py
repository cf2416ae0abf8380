"""Instructions from annotated images."""
