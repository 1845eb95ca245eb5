"""Shared by the recipes that learn one task after another, ``new_task`` and ``split_tasks``."""
