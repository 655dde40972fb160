"""``mixer_stage`` in Triton. `forward` and `backward` launch what stands in the files of kernels, which call `device`;
`plan` has the sizes of the launches."""

from mirage_kernels.mixer_stage.triton.backward import backward
from mirage_kernels.mixer_stage.triton.forward import forward
from mirage_kernels.mixer_stage.triton.plan import can_run

__all__ = ["backward", "can_run", "forward"]
