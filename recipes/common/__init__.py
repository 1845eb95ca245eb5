"""What the recipes share; nothing here imports a recipe."""
