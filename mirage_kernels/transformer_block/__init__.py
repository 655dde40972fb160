"""A whole MIRAGE block: both of its stages, as one operator where no gradient is wanted."""

from mirage_kernels.transformer_block.op import transformer_block
from mirage_kernels.transformer_block.reference import transformer_block as reference

__all__ = ["reference", "transformer_block"]
