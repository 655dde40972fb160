"""Kernels compiled and libraries set up before the first image comes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

__all__ = ["warmup"]


def warmup(model: nn.Module, shapes: Iterable[Sequence[int]]) -> None:
    """Run `model` once on an image of zeros of each shape.

        model.eval()
        mirage.fast.warmup(model, [(1, 3, 224, 224), (1, 3, 1080, 1920)])

    Triton compiles a kernel at the first call with arguments of a kind (seconds each; its cache on disk keeps them for
    the next process), and libraries choose algorithms: afterwards an image of one of these shapes takes as long as it
    always will. In training mode each run includes a backward pass. Under autocast it warms up what runs under
    autocast.

    Weights, buffers, their gradients and the state of the random number generators are as before. The model may return
    one tensor, or tuples, lists and dictionaries of some (that of the released code returns an image and a loss).

    Args:
        model: Its floating-point parameters, all of one device, tell device and dtype of the images.
        shapes: [B, C, H, W] of each.

    Raises:
        TypeError: `model` is no module.
        ValueError: `model` has no floating-point parameter or some on several devices, `shapes` is empty, or one of
            them is not four positive numbers. What the model raises of a shape that it does not take passes through.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    shapes = [tuple(shape) for shape in shapes]
    if not shapes:
        raise ValueError("shapes: expected at least one [B, C, H, W], got none")
    for shape in shapes:
        if len(shape) != 4 or not all(isinstance(size, int) and size > 0 for size in shape):
            raise ValueError(f"shapes: expected four positive numbers [B, C, H, W], got {list(shape)}")
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    devices = {p.device for p in parameters}
    if len(devices) != 1:
        found = ", ".join(sorted(map(str, devices))) or "none"
        raise ValueError(f"model: expected floating-point parameters on one device, got {found}")
    (device,) = devices
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for shape in shapes:
            _run(model, torch.zeros(shape, device=device, dtype=parameters[0].dtype))
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _run(model: nn.Module, image: Tensor) -> None:
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}  # a batch norm updates its own
    with torch.set_grad_enabled(model.training):
        results = tree_leaves(torch.func.functional_call(model, buffers, (image,)))
    wanted = [p for p in model.parameters() if p.requires_grad]
    differentiable = [t for t in results if isinstance(t, Tensor) and t.requires_grad]
    if differentiable and wanted:
        total = torch.stack([t.float().sum() for t in differentiable]).sum()
        torch.autograd.grad(total, wanted, allow_unused=True)  # .grad is not touched
