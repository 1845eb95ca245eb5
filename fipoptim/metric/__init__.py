"""Products with the metric of weight space, from tangents and pullbacks of a network on its anchors."""

from fipoptim.metric.chunks import Form
from fipoptim.metric.metric import AnchorMetric

__all__ = ["AnchorMetric", "Form"]
