"""Sample data, and the scripts that build it, models, domains, and the data of small trials."""
