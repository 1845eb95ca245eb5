"""Runs the recipe: ``python -m recipes.update``."""

import sys

from recipes.update.command import main

if __name__ == "__main__":
    sys.exit(main())
