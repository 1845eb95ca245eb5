"""Teach a trained network a second task while it keeps the first: ``python -m recipes.new_task --help``."""
