"""A network in production learns more classes, and what it got right stays right within a budget."""
