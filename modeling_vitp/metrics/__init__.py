"""Metrics that `evaluate` loads, and what they share."""
