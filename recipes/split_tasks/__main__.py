"""Runs the recipe: ``python -m recipes.split_tasks``."""

import sys

from recipes.split_tasks.command import main

if __name__ == "__main__":
    sys.exit(main())
