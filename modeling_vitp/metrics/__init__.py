"""Metrics for `evaluate.load`, and their base classes."""

from .report import METRICS_FOLDER

__all__ = ["METRICS_FOLDER"]
