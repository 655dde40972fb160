"""Which network a state dict is of, and with which arguments it was built: by its names and shapes alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mirage.checkpoint import differences
from mirage.networks.common import RestorationNetwork
from mirage.networks.registry import NETWORKS, create

__all__ = ["Identified", "NAMES", "identify"]

NAMES = {
    "restormer": ("patch_embed.proj.weight", "down1_2.body.0.weight", "reduce_chan_level3.weight", "output.weight"),
    "nafnet": ("intro.weight", "intro.bias", "ending.weight", "ending.bias"),
    "srresnet": ("conv_first.weight", "conv_hr.weight", "conv_last.weight", "body.0.conv1.weight"),
}
"""Names by which networks are found in files, whatever their sizes; PromptIR has Restormer's."""

State = Mapping[str, Tensor]


class Identified:
    """The network that a state dict is most like.

    Attributes:
        name: of the network, for `mirage.networks.create`.
        arguments: with which its shapes are nearest to those of the state dict.
        problems: names that are missing, unexpected or mis-shaped in spite of that (`mirage.checkpoint.differences`).
    """

    def __init__(self, name: str, arguments: dict[str, Any], problems: dict[str, list[str]]) -> None:
        self.name, self.arguments, self.problems = name, arguments, problems

    @property
    def distance(self) -> int:
        """How many names do not fit."""
        return sum(map(len, self.problems.values()))

    def build(self) -> RestorationNetwork:
        """The network without memory for its weights (on the meta device)."""
        with torch.device("meta"):
            return create(self.name, **self.arguments)


def identify(state: State) -> Identified:
    """The network that a state dict is of, or the closest one where it is of none.

    Args:
        state: under the network's own names, without prefixes.
    """
    closest = None
    for name in NETWORKS:
        found = _as(name, state)
        if not found.problems:
            return found
        closest = found if closest is None or found.distance < closest.distance else closest
    assert closest is not None
    return closest


def _as(name: str, state: State) -> Identified:
    """What a state dict would be if it were of this network."""
    for arguments in (_ARGUMENTS[name](state), {}):
        found = Identified(name, arguments, {})
        try:
            found.problems = differences(found.build(), state)
        except (ValueError, RuntimeError, OverflowError):  # arguments from shapes of another network
            continue
        return found
    raise AssertionError(f"{name} cannot be built with its defaults")


def _shape(state: State, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    tensor = state.get(name)
    return tuple(tensor.shape) if tensor is not None and tensor.ndim == len(default) else default


def _count(state: State, prefix: str) -> int:
    """How many numbered modules there are below a name."""
    found = {key[len(prefix) :].split(".", 1)[0] for key in state if key.startswith(prefix)}
    return sum(number.isdigit() for number in found)


def _restormer(state: State) -> dict[str, Any]:
    dim, in_channels, _, _ = _shape(state, "patch_embed.proj.weight", (48, 3, 3, 3))
    levels = [f"encoder_level{i}" for i in (1, 2, 3)] + ["latent"]
    others = ["decoder_level1", "decoder_level2", "decoder_level3", "latent"]
    heads = [_heads(state, level) or _heads(state, other) or 1 for level, other in zip(levels, others, strict=True)]
    arguments = {
        "in_channels": in_channels,
        "out_channels": _shape(state, "output.weight", (in_channels, 0, 0, 0))[0],
        "dim": dim,
        "num_blocks": [_count(state, f"{level}.") for level in levels],
        "num_refinement_blocks": _count(state, "refinement."),
        "heads": heads,
        "ffn_expansion_factor": _expansion(state),
        "bias": "output.bias" in state,
        "norm": "BiasFree" if _without_norm_bias(state) else "WithBias",
    }
    return {**arguments, "dual_pixel_task": True} if "skip_conv.weight" in state else arguments


def _heads(state: State, level: str) -> int:
    """Attention heads of a level, as its first block tells; 0 where none does."""
    blocks = range(_count(state, f"{level}."))
    return next((t[0] for i in blocks if (t := _shape(state, f"{level}.{i}.attn.temperature", (0, 0, 0)))[0]), 0)


def _promptir(state: State) -> dict[str, Any]:
    arguments = _restormer(state)
    arguments.pop("dual_pixel_task", None)
    arguments["heads"][2] = _shape(state, "noise_level3.attn.temperature", (arguments["heads"][2], 0, 0))[0]
    return arguments


def _without_norm_bias(state: State) -> bool:
    norms = [key for key in state if key.endswith(".norm1.body.weight")]
    return bool(norms) and not any(key.removesuffix("weight") + "bias" in state for key in norms)


def _expansion(state: State) -> float:
    """A factor with which every feed-forward network has its hidden channels, of as few digits as possible."""
    sizes = set()
    for key, value in state.items():
        if key.endswith(".ffn.project_in.weight") and value.ndim == 4 and value.shape[1]:
            sizes.add((value.shape[1], value.shape[0] // 2))
    usual = 2.66
    if all(int(dim * usual) == hidden for dim, hidden in sizes):
        return usual
    least = max(hidden / dim for dim, hidden in sizes)
    for digits in range(17):
        factor = math.ceil(least * 10**digits) / 10**digits
        if all(int(dim * factor) == hidden for dim, hidden in sizes):
            return factor
    return usual


def _nafnet(state: State) -> dict[str, Any]:
    width, in_channels, _, _ = _shape(state, "intro.weight", (32, 3, 3, 3))
    levels = range(_count(state, "downs."))
    return {
        "in_channels": in_channels,
        "width": width,
        "encoder_blocks": [_count(state, f"encoders.{i}.") for i in levels],
        "middle_blocks": _count(state, "middle_blks."),
        "decoder_blocks": [_count(state, f"decoders.{i}.") for i in levels],
    }


def _srresnet(state: State) -> dict[str, Any]:
    dim, in_channels, _, _ = _shape(state, "conv_first.weight", (64, 3, 3, 3))
    out_channels = _shape(state, "conv_last.weight", (in_channels, 0, 0, 0))[0]
    upscale = 1
    if "upconv2.weight" in state:
        upscale = 4
    elif "upconv1.weight" in state:
        upscale = 3 if _shape(state, "upconv1.weight", (0, 0, 0, 0))[0] == 9 * dim else 2
    arguments = {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "dim": dim,
        "num_blocks": _count(state, "body."),
        "upscale": upscale,
    }
    return arguments if out_channels == in_channels else {**arguments, "global_residual": False}


_ARGUMENTS: dict[str, Callable[[State], dict[str, Any]]] = {
    "nafnet": _nafnet,
    "promptir": _promptir,
    "restormer": _restormer,
    "srresnet": _srresnet,
}
