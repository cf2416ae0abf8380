"""Cards of models and data sets, licenses, and the records of runs."""
