"""Cards of models and data sets, licenses, and records of runs.

Internal: users import the names of `modeling_vitp`, see "What lies where" in `modeling_vitp/README.md`.
"""
