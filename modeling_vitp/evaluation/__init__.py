"""Evaluation of answers and of robustness, and comparisons over seeds.

Internal: users import the names of `modeling_vitp`, see "What lies where" in `modeling_vitp/README.md`.
"""
