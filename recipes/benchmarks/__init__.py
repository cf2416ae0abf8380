"""Speed of the package: steps, data loading, scaling, and other libraries beside it."""
