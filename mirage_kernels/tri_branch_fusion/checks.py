"""What both fusing operators check."""

from __future__ import annotations

from torch import Tensor

from mirage_kernels._runtime import checks


def check_branch(name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    checks.check_tensor(name, value, ndim=4)
    checks.check_shape(name, value, like.shape, f"like {like_name}")
    checks.check_same_device(like_name, like, **{name: value})


def check_scalars(like_name: str, like: Tensor, **scalars: Tensor) -> None:
    for name, value in scalars.items():
        checks.check_tensor(name, value)
        if tuple(value.shape) not in ((1,), ()):
            raise ValueError(f"{name}: expected shape [1] or [], got {list(value.shape)}")
    checks.check_same_device(like_name, like, **scalars)
