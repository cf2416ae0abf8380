"""Labeled images on disk: their layouts, splits, classes, boxes and windows."""
