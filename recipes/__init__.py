"""Runnable recipes: one package a task, ``python -m recipes.NAME --help``."""
