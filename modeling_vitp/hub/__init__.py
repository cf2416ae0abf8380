"""Models, data sets and Spaces on their way to the Hub."""
