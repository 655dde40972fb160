"""``mixer_stage`` in Triton. `forward` and `backward` launch what stands in the files of kernels, which call `device`;
`plan` has the sizes of the launches."""

from mirage_kernels.mixer_stage.triton.backward import backward
from mirage_kernels.mixer_stage.triton.forward import forward
from mirage_kernels.mixer_stage.triton.plan import backward_problem, forward_problem

__all__ = ["backward", "backward_problem", "forward", "forward_problem"]
