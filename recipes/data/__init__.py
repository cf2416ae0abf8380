"""Sample data, and how it is made."""
