"""Adaptation of a ViT to a domain: from labels to a verdict.

Internal: users import the names of `modeling_vitp`, see "What lies where" in `modeling_vitp/README.md`.
"""
