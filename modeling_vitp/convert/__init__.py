"""Bit-exact conversion of checkpoints between layouts, and export of the backbone.

Internal: users import the names of `modeling_vitp`, see "What lies where" in `modeling_vitp/README.md`.
"""
