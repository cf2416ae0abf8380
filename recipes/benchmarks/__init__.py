"""Benchmarks of vision-language models and of backbones by other libraries, for the user's own models."""
