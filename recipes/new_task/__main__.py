"""Runs the recipe: ``python -m recipes.new_task``."""

import sys

from recipes.new_task.command import main

if __name__ == "__main__":
    sys.exit(main())
