"""Probes: measurements of how well a task is solved from the features of a frozen backbone.

Internal: users import the names of `modeling_vitp`, see "What lies where" in `modeling_vitp/README.md`.
"""
