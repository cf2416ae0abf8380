"""Training: whole checkpoints, exact resuming, pushes, batches, and the pretraining."""
