"""A gated half of a block, such as MIRAGE's ``x + ffn(norm2(x))``, as one operator that keeps its input only."""

from mirage_kernels.feed_forward_stage.op import feed_forward_stage
from mirage_kernels.feed_forward_stage.reference import feed_forward_stage as reference
from mirage_kernels.feed_forward_stage.weights import FeedForwardWeights

__all__ = ["FeedForwardWeights", "feed_forward_stage", "reference"]
