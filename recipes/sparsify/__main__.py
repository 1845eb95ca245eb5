"""Runs the recipe: ``python -m recipes.sparsify``."""

import sys

from recipes.sparsify.command import main

if __name__ == "__main__":
    sys.exit(main())
