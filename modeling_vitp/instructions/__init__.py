"""Instruction data: rows, sources, mixtures, and the collator that makes batches of them.

Internal: users import the names of `modeling_vitp`, see "What lies where" in `modeling_vitp/README.md`.
"""
