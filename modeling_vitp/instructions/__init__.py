"""Instruction data: rows, sources, mixtures, and the collator that makes batches of them."""
