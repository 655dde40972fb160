"""``channel_attention`` in Triton."""

from mirage_kernels.channel_attention.triton.backward import backward
from mirage_kernels.channel_attention.triton.forward import forward

__all__ = ["backward", "forward"]
