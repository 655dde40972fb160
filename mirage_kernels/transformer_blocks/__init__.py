"""MIRAGE blocks one after the other: both stages of each, all as one operator where no gradient is wanted."""

from mirage_kernels.transformer_blocks.op import transformer_blocks
from mirage_kernels.transformer_blocks.reference import transformer_blocks as reference
from mirage_kernels.transformer_blocks.weights import BlockWeights, PackedBlocks

__all__ = ["BlockWeights", "PackedBlocks", "reference", "transformer_blocks"]
