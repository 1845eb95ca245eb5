"""The inputs whose outputs must not change, and the function that a network computes on them."""

from fipoptim.anchors.batch import AnchorBatch
from fipoptim.anchors.inputs import Inputs
from fipoptim.anchors.measured import Measured
from fipoptim.anchors.network_function import NetworkFunction, Weights
from fipoptim.anchors.output_space import squared_distance
from fipoptim.anchors.sample import Sample

__all__ = [
    "AnchorBatch",
    "Inputs",
    "Measured",
    "NetworkFunction",
    "Sample",
    "Weights",
    "squared_distance",
]
