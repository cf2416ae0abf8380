"""What all trainings share: whole checkpoints, exact resuming, pushes, batches, results and costs."""
