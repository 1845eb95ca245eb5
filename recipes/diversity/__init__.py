"""Make an ensemble from one trained network and attack it: ``python -m recipes.diversity --help``."""
