"""A pretrained network learns new classes, and what it says of everything else stays within a budget."""
