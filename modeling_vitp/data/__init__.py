"""Labeled images on disk: their layouts, splits, classes, boxes and windows.

Internal: users import the names of `modeling_vitp`, see "What lies where" in `modeling_vitp/README.md`.
"""
