"""Planned experiments over seeds, and their recorded scores."""
