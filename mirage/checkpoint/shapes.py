"""Which MIRAGE weights without a word about it belong to: its arguments, read from the shapes of the tensors.

Channels, blocks, heads, the expansion of the feed-forward networks and the SPD head all show in the shapes; stochastic
depth, which leaves no trace in them, does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mirage.model import MIRAGE

__all__ = ["arguments_by_shapes", "head_of_another_size", "misfits", "without_head"]

ENCODER = ("encoder_level1", "encoder_level2", "encoder_level3", "latent")
SHARING_HEADS = (
    ("encoder_level1", "decoder_level1", "refinement"),
    ("encoder_level2", "decoder_level2"),
    ("encoder_level3", "decoder_level3"),
    ("latent",),
)
HEAD = ("reduce_shallow.", "reduce_latent.", "spd_proj_")


def arguments_by_shapes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of `MIRAGE` for a state dict under the network's own names that has the stem's weight.

    Whether the rest of the weights goes with them, `misfits` tells.
    """
    dim, in_channels = state["patch_embed.proj.weight"].shape[:2]
    arguments: dict[str, Any] = {
        "in_channels": in_channels,
        "dim": dim,
        "num_blocks": [_count(state, level) for level in ENCODER],
        "num_refinement_blocks": _count(state, "refinement"),
        "heads": [_heads(state, levels) for levels in SHARING_HEADS],
        "ffn_expansion_factor": _expansion(state),
        "spd": any(name.startswith(HEAD) for name in state),
    }
    for argument, name in (
        ("spd_shallow_channels", "reduce_shallow.weight"),
        ("spd_latent_channels", "reduce_latent.weight"),
        ("spd_features", "spd_proj_shallow.weight"),
    ):
        if name in state:
            arguments[argument] = state[name].shape[0]
    return arguments


def misfits(state: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> list[str]:
    """Names that only these weights have, or only those of ``MIRAGE(**arguments)``, or both in two shapes; or what is
    wrong with the arguments."""
    try:
        with torch.device("meta"):
            expected = {name: value.shape for name, value in MIRAGE(**arguments).state_dict().items()}
    except ValueError as error:
        return [str(error)]
    found = {name: value.shape for name, value in state.items()}
    return [name for name in {**found, **expected} if found.get(name) != expected.get(name)]


def head_of_another_size(state: Mapping[str, Tensor]) -> str | None:
    """Why the SPD head cannot belong to the network beside it; None where it can, or there is none.

    The released code builds it for the channels of its two sizes, whatever ``dim`` is, and a network of another size
    has one that cannot run.
    """
    dim = state["patch_embed.proj.weight"].shape[0]
    for name, channels in (("reduce_shallow.weight", dim), ("reduce_latent.weight", 4 * dim)):
        if name in state and state[name].shape[1] != channels:
            return f"{name} takes {state[name].shape[1]} channels where there are {channels}"
    return None


def without_head(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights without those of the SPD head."""
    return {name: value for name, value in state.items() if not name.startswith(HEAD)}


def _blocks(state: Mapping[str, Tensor], level: str) -> set[str]:
    return {name.split(".")[1] for name in state if name.startswith(f"{level}.")}


def _count(state: Mapping[str, Tensor], level: str) -> int:
    """Blocks up to the last one: one that is missing between others has to be missed."""
    return 1 + max((int(number) for number in _blocks(state, level) if number.isdecimal()), default=-1)


def _heads(state: Mapping[str, Tensor], levels: tuple[str, ...]) -> int:
    for level in levels:
        for number in sorted(_blocks(state, level)):
            temperature = state.get(f"{level}.{number}.attn.temperature")
            if temperature is not None and temperature.ndim == 3:
                return temperature.shape[0]
    return 1


def _expansion(state: Mapping[str, Tensor]) -> float:
    """The least one with which every feed-forward network gets its width, ``int(channels * expansion)``."""
    shapes = [value.shape for name, value in state.items() if name.endswith(".ffn.project_out.weight")]
    widths = {(shape[0], shape[1]) for shape in shapes if len(shape) == 4 and shape[0] > 0}
    if not widths:
        return 2.0
    expansion = max(hidden / channels for channels, hidden in widths)
    for _ in range(4):  # the quotient's rounding may have made it less than that
        if all(int(channels * expansion) >= hidden for channels, hidden in widths):
            break
        expansion *= 1 + 2.0**-52
    return expansion
