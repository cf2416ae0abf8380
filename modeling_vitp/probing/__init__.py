"""Probes: measurements of how well a task is solved from the features of a frozen backbone."""
