"""Laboratory: benchmarks, planned experiments and builders of sample data, run from a clone. Not in the wheel."""
