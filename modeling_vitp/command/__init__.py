"""Error reports and paths of all commands."""
