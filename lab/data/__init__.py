"""Sample data, and the scripts that build it and the data of small trials."""
