"""The metric's spectrum: how many directions of weight space the outputs depend on, and how far a network may move."""
