"""What the recipes that learn one task after another share."""
