"""Runs the recipe: ``python -m recipes.diversity``."""

import sys

from recipes.diversity.command import main

if __name__ == "__main__":
    sys.exit(main())
