"""Feed-forward stages one after the other, all as one operator where no gradient is wanted."""

from mirage_kernels.feed_forward_stages.op import feed_forward_stages
from mirage_kernels.feed_forward_stages.reference import feed_forward_stages as reference
from mirage_kernels.feed_forward_stages.weights import ScaledFeedForward

__all__ = ["ScaledFeedForward", "feed_forward_stages", "reference"]
