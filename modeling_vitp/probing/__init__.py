"""Probes: how much of a task can be read from a backbone's features, with the backbone left as it is."""
