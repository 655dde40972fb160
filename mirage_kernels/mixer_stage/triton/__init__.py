"""``mixer_stage`` in Triton. `forward` and `backward` launch what stands in the files of kernels, which call `device`;
`plan` has the sizes of the launches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor

from mirage_kernels._triton.cases import HEADS, meta, stage_variants
from mirage_kernels.mixer_stage.triton.backward import backward
from mirage_kernels.mixer_stage.triton.forward import forward
from mirage_kernels.mixer_stage.triton.plan import can_run
from mirage_kernels.mixer_stage.weights import MixerWeights, shapes

__all__ = ["backward", "can_run", "forward", "triton_cases"]


def triton_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """What tools/compile_triton.py compiles for GPUs that are not there."""
    for label, (channels, side), dtype, wide in stage_variants():
        x, heads = meta(1, channels, side, side, dtype=dtype, wide=wide), HEADS[channels, side]
        if can_run(x, heads):
            yield label, partial(_compile, x, heads)
    yield "float32 training C=48 112x112", partial(_compile, meta(2, 48, 112, 112), 2, training=True)


def _compile(x: Tensor, heads: int, training: bool = False) -> None:
    """Forward on x and weights of its dtype, and backward."""
    sizes = shapes(x.shape[1], heads, int(8 / 3 * (x.shape[1] // 3)))
    weights = MixerWeights(**{name: meta(*size, dtype=x.dtype) for name, size in sizes.items()})
    scale = meta(x.shape[0], dtype=x.dtype) if training else None
    _, statistics = forward(x, weights, scale, training, 1e-5, 1e-5)
    backward(x, x, weights, scale, statistics, training, 1e-5, 1e-5)
