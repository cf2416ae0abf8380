"""Benchmarks of remote sensing and medicine as tasks of lmms-eval."""
