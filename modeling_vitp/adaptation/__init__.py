"""Adaptation of a ViT to a domain: from labels to a verdict."""
