"""Recipes: one entry point a file."""
