"""Evaluation of answers and of robustness, and comparisons over seeds."""
