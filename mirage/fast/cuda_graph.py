"""Inference as one CUDA graph: for images so small that launching their kernels takes longer than running them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

__all__ = ["GraphedModel", "cuda_graph"]

WARM_UPS = 3
"""Passes before the capture: kernels are compiled, libraries choose algorithms and allocate what they keep."""


def cuda_graph(model: nn.Module, example: Tensor) -> GraphedModel:
    """Capture an inference pass of `model` on images like `example`, to be replayed with one launch.

        restore = mirage.fast.cuda_graph(model, image)
        restored = restore(image)

    The graph reads the model's weights where they lie: changes in place (an optimizer's step, an average's `copy_`,
    `load_state_dict`) take part at once. Where a weight or buffer is another tensor than at the capture
    (`load_state_dict(assign=True)`, `model.to`), or autocast is set otherwise, the next call captures again.

    Args:
        model: In eval mode, with its weights on a CUDA device. Modules and hooks that are added later are not seen.
        example: [B, 3, H, W] on that device, of the shape and dtype of every image to come. Its values do not matter.

    Returns:
        A function of such an image, with the model's result (a tensor, or tuples, lists and dictionaries of some).
        Memory for one pass is kept as long as it lives.

    Raises:
        TypeError: `example` is no tensor, or `model` no module.
        ValueError: `example` or a weight is not on a CUDA device, or `model` is in training mode.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(example, Tensor):
        raise TypeError(f"example: expected a tensor, got {type(example).__name__}")
    if example.device.type != "cuda":
        raise ValueError(f"example: expected a tensor on a CUDA device, got {example.device}")
    return GraphedModel(model, example)


class GraphedModel:
    """What `cuda_graph` returns."""

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        self.model = model
        self._image = torch.empty_like(example, memory_format=torch.contiguous_format)
        self._capture()

    def __call__(self, image: Tensor) -> Any:
        """`model(image)`, without a gradient, in tensors of its own.

        Raises:
            TypeError, ValueError: `image` is not like the example: what was expected, and what came.
            ValueError: the model is in training mode.
        """
        self._check(image)
        self._image.copy_(image)
        # The old weights are kept alive, so a stale graph may run; to look for changes meanwhile takes no time.
        self._replay()
        if self._is_stale():
            self._capture()
            self._replay()
        return tree_map_only(Tensor, Tensor.clone, self._result)

    def _check(self, image: Tensor) -> None:
        if not isinstance(image, Tensor):
            raise TypeError(f"image: expected a tensor, got {type(image).__name__}")
        for name in ("shape", "dtype", "device"):
            expected, got = getattr(self._image, name), getattr(image, name)
            if expected != got:
                expected, got = (list(v) if name == "shape" else v for v in (expected, got))
                raise ValueError(f"image: expected {name} {expected} as in the example, got {got}")
        if self.model.training:
            raise ValueError("model: expected eval mode, got training mode: call model.eval()")

    def _is_stale(self) -> bool:
        weights = _weights(self.model)
        if len(weights) != len(self._weights) or _autocast() != self._autocast:
            return True
        return any(a is not b or a.data_ptr() != p for a, (b, p) in zip(weights, self._weights, strict=True))

    def _capture(self) -> None:
        weights = _weights(self.model)
        for weight in weights:
            if weight.device != self._image.device:
                raise ValueError(f"model: expected weights on {self._image.device} like the example, got some on "
                                 f"{weight.device}")  # fmt: skip
        if self.model.training:
            raise ValueError("model: expected eval mode, got training mode: call model.eval()")
        # Of each weight its memory too, which `weight.data = ...` would free.
        self._weights = [(w, w.data_ptr()) for w in weights]
        self._kept = [w.detach() for w in weights]
        self._autocast = _autocast()
        self._record()

    def _record(self) -> None:
        with torch.cuda.device(self._image.device), torch.no_grad():
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    self.model(self._image)
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._result = self.model(self._image)

    def _replay(self) -> None:
        with torch.cuda.device(self._image.device):
            self._graph.replay()


def _weights(model: nn.Module) -> list[Tensor]:
    """All parameters and buffers of a model, each where it is used."""
    found: list[Tensor] = []
    for module in model.modules():
        found += (t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None)
    return found


def _autocast() -> tuple[Any, ...]:
    return torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
