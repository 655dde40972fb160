"""Whether child modules compute exactly what a stage computes in their place, and what the stage leaves to Python.

A stage takes the weights of its child modules and bypasses their forward. That is the same as calling them only while
each is of the expected class, configured as in `mirage.blocks`, and without hooks or parametrizations. Users may change
any of it at any time, so it is looked at in every forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mirage import blocks

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_bare(*modules: nn.Module) -> bool:
    """True where calling the modules is the same as using their weights: no hooks, no parametrization."""
    for module in modules:
        state = module.__dict__
        if state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state:
            return False
        if state["_backward_hooks"] or state["_backward_pre_hooks"] or "parametrizations" in state["_modules"]:
            return False
    return True


def children(module: nn.Module) -> dict[str, nn.Module]:
    """The child modules by name: an attribute of a module costs ten times as much to read."""
    return module._modules


def parameters(module: nn.Module) -> dict[str, Tensor]:
    return module._parameters


def is_convolution(module: nn.Module, size: int = 1, groups: int = 1, kind: type[nn.Module] = nn.Conv2d) -> bool:
    """True for the bias-free, stride-1, zero-padded, same-size convolution that the reference has."""
    return type(module) is kind and _is_same_size(module, size, groups) and is_bare(module)


def is_dense_convolution(module: nn.Conv2d) -> bool:
    """True for a convolution that is what `mirage_kernels.dense_conv2d` computes of its weight."""
    return module.kernel_size in ((1, 1), (3, 3)) and _is_same_size(module, module.kernel_size[0], groups=1)


def _is_same_size(conv: Any, size: int, groups: int) -> bool:
    state = conv.__dict__  # whose items cost a third of the module's attributes
    dims = len(state["kernel_size"])
    ones = (1,) * dims
    return (
        state["kernel_size"] == (size,) * dims
        and state["padding"] == (size // 2,) * dims
        and state["stride"] == ones
        and state["dilation"] == ones
        and state["groups"] == groups
        and state["padding_mode"] == "zeros"
        and state["_parameters"].get("bias") is None
    )


def is_gelu(module: nn.Module) -> bool:
    """True for the exact GELU."""
    return type(module) is nn.GELU and module.approximate == "none" and is_bare(module)


def is_global_average(module: nn.Module) -> bool:
    return type(module) is nn.AdaptiveAvgPool2d and module.output_size in (1, (1, 1)) and is_bare(module)


def is_sequence(module: nn.Module, length: int) -> bool:
    return type(module) is nn.Sequential and len(children(module)) == length and is_bare(module)


def is_batch_norm(module: nn.Module) -> bool:
    """True for a batch norm with weight, bias and running statistics that average exponentially."""
    return (
        type(module) is nn.BatchNorm2d
        and module.affine
        and module.track_running_stats
        and module.momentum is not None
        and module._buffers["running_mean"] is not None
        and module._buffers["running_var"] is not None
        and is_bare(module)
    )


def update_running_statistics(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: int) -> None:
    """What `nn.BatchNorm2d` does in training with mean and biased variance [C] of `count` values per channel."""
    with torch.no_grad():
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
        unbiased = variance * (count / (count - 1))
        for running, value in ((norm.running_mean, mean), (norm.running_var, unbiased)):
            if running.dtype == value.dtype:
                running.mul_(1 - norm.momentum).add_(value, alpha=norm.momentum)
            else:
                running.copy_((1 - norm.momentum) * running.to(value.dtype) + norm.momentum * value)


def is_drop_path(module: nn.Module) -> bool:
    """True for none, and for stochastic depth by a factor per sample: `mirage.blocks.DropPath` and that of timm."""
    if type(module) is nn.Identity or type(module) is blocks.DropPath:
        return is_bare(module)
    return type(module).__name__ == "DropPath" and hasattr(module, "drop_prob") and is_bare(module)


def branch_scale(drop_path: nn.Module, x: Tensor) -> Tensor | None:
    """The factor of each sample of x, [B], or None: what `drop_path` multiplies by.

    It is asked for its result on ones, one value per sample: random numbers are drawn in the same order and number,
    and in the same dtype, as they would be on the branch itself.
    """
    if type(drop_path) is nn.Identity or not drop_path.training or drop_path.drop_prob == 0.0:
        return None
    device, dtype = x.device.type, x.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)  # that of a convolution's result
    return drop_path(x.new_ones((x.shape[0], 1, 1, 1), dtype=dtype)).view(-1)
