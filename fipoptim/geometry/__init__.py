"""The norm in which the length of a step is measured."""
