"""Bit-exact conversion of checkpoints between layouts, and export of the backbone."""
