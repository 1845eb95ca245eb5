"""Runs the recipe: ``python -m recipes.hotfix``."""

import sys

from recipes.hotfix.command import main

if __name__ == "__main__":
    sys.exit(main())
