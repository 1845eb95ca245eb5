"""Take weights out of a trained network while it keeps its function: ``python -m recipes.sparsify --help``."""
