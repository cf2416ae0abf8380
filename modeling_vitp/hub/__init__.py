"""Upload of models, data sets and Spaces to the Hub.

Internal: users import the names of `modeling_vitp`, see "What lies where" in `modeling_vitp/README.md`.
"""
