"""Cards of models and data sets, licenses, and records of runs."""
