"""Eq. 4 from products with the metric alone; nothing about networks."""
