"""Speed of the package: training steps, data loading, scaling, and comparisons with other libraries."""
