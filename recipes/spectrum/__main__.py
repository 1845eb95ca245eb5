"""Runs the recipe: ``python -m recipes.spectrum``."""

import sys

from recipes.spectrum.command import main

if __name__ == "__main__":
    sys.exit(main())
