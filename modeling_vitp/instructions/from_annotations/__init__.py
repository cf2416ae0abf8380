"""Instructions made from annotated images."""
