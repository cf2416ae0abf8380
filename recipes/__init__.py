"""Recipes, one entry point per file."""
