"""Metrics that `evaluate` loads, and what they share."""

from .report import METRICS_FOLDER

__all__ = ["METRICS_FOLDER"]
