"""Shared by all recipes; nothing here imports a recipe."""
