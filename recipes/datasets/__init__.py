"""Conversions of public data sets to instruction data."""
