"""Upload of models, data sets and Spaces to the Hub."""
