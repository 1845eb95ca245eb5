"""Learn tasks in turn, with a few remembered inputs of those before: ``python -m recipes.split_tasks --help``."""
