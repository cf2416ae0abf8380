"""Checkpoints in and out of other layouts, exact to the bit, and the exported backbone."""
