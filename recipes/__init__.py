"""Runnable recipes: one module a task, ``python -m recipes.NAME --help``."""
