"""Public data sets, one a file; `vitp make_public_set` finds them by their names."""
