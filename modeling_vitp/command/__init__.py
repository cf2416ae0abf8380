"""What the commands have in common, whatever they do."""
