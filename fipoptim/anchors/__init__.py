"""The inputs whose outputs must not change, and the function that a network computes on them."""

from fipoptim.anchors.batch import AnchorBatch, Sample, squared_distance

__all__ = ["AnchorBatch", "Sample", "squared_distance"]
