"""``feed_forward_stage`` in Triton. `plan` has the sizes of the launches."""

from mirage_kernels.feed_forward_stage.triton.backward import backward
from mirage_kernels.feed_forward_stage.triton.forward import forward
from mirage_kernels.feed_forward_stage.triton.plan import backward_problem, forward_problem

__all__ = ["backward", "backward_problem", "forward", "forward_problem"]
