"""FIPOptimizer in the training loops of other libraries; each is imported when its module here is asked for."""

from fipoptim.integrations.carried import carry_anchors

__all__ = ["carry_anchors"]
