"""Engine of all trainings: whole checkpoints, exact resuming, pushes, batches, results and costs.

Internal: users import the names of `modeling_vitp`, see "What lies where" in `modeling_vitp/README.md`.
"""
