"""``feed_forward_stage`` in Triton. `plan` has the sizes of the launches."""

from mirage_kernels.feed_forward_stage.triton.backward import backward
from mirage_kernels.feed_forward_stage.triton.forward import forward
from mirage_kernels.feed_forward_stage.triton.plan import can_run, can_run_backward

__all__ = ["backward", "can_run", "can_run_backward", "forward"]
