"""Planned experiments over several seeds, and their recorded scores."""
