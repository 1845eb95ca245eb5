"""Runs the recipe: ``python -m recipes.finetune``."""

import sys

from recipes.finetune.command import main

if __name__ == "__main__":
    sys.exit(main())
