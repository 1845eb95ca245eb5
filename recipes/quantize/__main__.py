"""Runs the recipe: ``python -m recipes.quantize``."""

import sys

from recipes.quantize.command import main

if __name__ == "__main__":
    sys.exit(main())
