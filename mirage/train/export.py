"""The weights of a checkpoint of training: a ``.safetensors`` file with nothing else in it, and a card about it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mirage.checkpoint import CONFIG_KEY, CheckpointError
from mirage.networks.loading import NETWORK_KEY
from mirage.networks.registry import NETWORKS
from mirage.train.state import State, checkpoints, read_state
from mirage.whole_files import safetensors_bytes, write_whole
from mirage.wording import counted

__all__ = ["DTYPES", "export_weights", "kind_text", "model_card"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def export_weights(
    checkpoint: str | os.PathLike[str], output: str | os.PathLike[str], *, dtype: str = "float16", average: bool = True
) -> State:
    """Write the weights of a checkpoint of training to a ``.safetensors`` file that `mirage.from_checkpoint` reads (of
    other networks than MIRAGE, `mirage.networks.load`).

    Args:
        checkpoint: of training, or the folder of a run, whose newest is then meant.
        output: the file, which appears when it is complete.
        dtype: of floating-point tensors there: float16, bfloat16 or float32.
        average: the averaged weights, where the checkpoint has them.

    Returns:
        The checkpoint's state.

    Raises:
        FileNotFoundError: there is no checkpoint, or no folder for the output.
        ValueError: the name does not end in ``.safetensors``; an unknown dtype; or a weight does not fit the dtype.
        CheckpointError: the checkpoint is damaged.
    """
    output = Path(output)
    if output.suffix != ".safetensors":
        raise ValueError(f"output must end in .safetensors, got {str(output)!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    path = newest(checkpoint)
    state = read_state(path)
    weights = state.average if average and state.average else state.network
    tensors = {name: _as(value, DTYPES[dtype], name) for name, value in weights.items()}
    metadata = {"format": "pt"}
    model = state.config.get("model", {})
    ablation, network = model.get("ablation"), model.get("network", "mirage")
    if network != "mirage":
        metadata[NETWORK_KEY] = json.dumps({"name": network, "arguments": state.arguments})
    elif ablation:  # no network that from_checkpoint could build
        metadata["mirage_ablation"] = ablation
    elif state.arguments:
        metadata[CONFIG_KEY] = json.dumps(state.arguments)
    write_whole(output, safetensors_bytes(tensors, metadata))
    return state


def newest(checkpoint: str | os.PathLike[str]) -> Path:
    """The checkpoint that is meant by a file or a folder."""
    path = Path(checkpoint)
    if not path.is_dir():
        return path
    files = checkpoints(path)
    if not files:
        raise FileNotFoundError(f"no checkpoint in {str(path)!r}")
    return files[-1]


def _as(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    if not value.is_floating_point():
        return value.contiguous()
    converted = value.to(dtype).contiguous()
    if not bool(torch.isfinite(converted).all()):
        raise ValueError(f"{name}: holds values that are not finite as {dtype}: of at most {value.abs().max():.4g}")
    return converted


@dataclass(frozen=True)
class _Facts:
    """What a card says of a run, from its checkpoint."""

    state: State

    @property
    def config(self) -> dict[str, Any]:
        return self.state.config

    @property
    def network(self) -> str:
        model = self.config["model"]
        name = model.get("network", "mirage")
        return f"MIRAGE, {model['size']}" if name == "mirage" else NETWORKS[name].__name__

    @property
    def head(self) -> str:
        model = self.config["model"]
        if model.get("network", "mirage") != "mirage":
            return ""
        return f", {'with' if model['spd'] else 'without'} SPD head"

    @property
    def finished(self) -> bool:
        s = self.config["schedule"]
        decayed = s["kind"] == "cosine" or s["decay_from"] is not None
        return decayed and s["steps"] is not None and self.state.step >= s["steps"]

    @property
    def rate(self) -> str:
        s, lr = self.config["schedule"], self.config["optimizer"]["lr"]
        warmup = f"linear warm-up of {counted(s['warmup'], 'step')}" if s.get("warmup") else "no warm-up"
        if s["kind"] == "cosine":
            return f"{lr:g}, {warmup}, cosine decay"
        if s["decay_from"] is None:
            return f"{lr:g}, {warmup}, then constant (no decay yet)"
        return f"{lr:g}, {warmup}, constant to step {s['decay_from']}, then linear decay to step {s['steps']}"


def model_card(
    state: State, weights: str, *, data: str, licence: str, results: str = "", average: bool = True
) -> str:
    """The text of a model card (Markdown): what the weights are for, how they were trained, and what they reach.

    Args:
        state: of the checkpoint that they are from, with a configuration in it.
        weights: name of their file.
        data: what they were trained on.
        licence: what may be done with them.
        results: Markdown that tells what they reach, such as a table of `mirage evaluate`.
        average: they are the averaged ones, where the checkpoint has them.

    Raises:
        CheckpointError: the checkpoint has no configuration, as those of the released code.
    """
    if not state.config:
        raise CheckpointError("the checkpoint has no configuration, of which the card could tell")
    facts = _Facts(state)
    c = state.config
    o, d, loss = c["optimizer"], c["data"], c["loss"]
    sets = [f"{s.get('name') or s.get('task') or 'set'}: {_what(s)}" for s in d["sets"]]
    fourier = loss["fourier_weight"] if loss["fourier_weight"] is not None else 0.1
    lines = [
        f"# {weights}",
        "",
        f"{facts.network} (`{json.dumps(state.arguments)}`).",
        "" if facts.finished else "\n**An intermediate state of a training that has not ended.**\n",
        "| | |",
        "|---|---|",
        f"| data | {data} |",
        f"| licence | {licence} |",
        f"| samples | {'; '.join(sets)} |",
        f"| crops | {d['crop']} x {d['crop']}, flips and quarter turns: {d.get('augment', 'all')} |",
        f"| steps | {state.step:,} of {d['batch']} crop{'s' if d['batch'] != 1 else ''} |",
        *([f"| starts from | the weights of `{Path(start).name}` |"] if (start := c["model"].get("weights")) else []),
        f"| time | {state.seconds / 3600:.1f} hours, pauses included |",
        f"| loss | L1{f' + {fourier:g} Fourier' if fourier else ''}{facts.head} |",
        f"| optimiser | {o['name']}, betas {o['betas'][0]:g} and {o['betas'][1]:g}, weight decay {o['weight_decay']}, "
        f"gradients clipped to {o['clip']} |",
        f"| learning rate | {facts.rate} |",
        *([f"| stochastic depth | {c['model']['drop_path']:g} |"] if facts.head else []),
        f"| average | {'of decay ' + format(ema, 'g') if (ema := c['trainer'].get('ema')) and average else 'none'} |",
        f"| seed | {c['seed']} |",
        "",
    ]
    if results:
        lines += ["## Results", "", results.strip(), ""]
    return "\n".join(lines)


def _what(one: dict[str, Any]) -> str:
    if one.get("kind") is not None:
        kinds = one["kind"] if isinstance(one["kind"], list) else [one["kind"]]
        return f"{', '.join(map(kind_text, kinds))}, drawn for each sample"
    sigma = one.get("sigma")
    rain = "synthetic rain" if one.get("rain") else ""
    if one.get("scale", 1) > 1:
        smaller = f"made {one['scale']} times smaller by bicubic interpolation"
        rain = f"{rain}, {smaller}" if rain else smaller
    if sigma is None:
        return rain or "pairs of pictures"
    bounds = sigma if isinstance(sigma, list) else [sigma]
    text = f"{bounds[0]:g}" if len(bounds) == 1 else f"{bounds[0]:g} to {bounds[1]:g}, drawn for each sample"
    noise = one.get("noise", "float")
    kind = ", neither rounded nor clipped" if noise == "float" else f", clipped and {noise} to 8 bits"
    return f"{rain + ', and ' if rain else ''}Gaussian noise of sigma {text}{kind}"


def kind_text(kind: Any) -> str:
    """A ``kind`` of a set, in words."""
    if not isinstance(kind, dict):
        return "the eleven degradations of GRIDS" if kind == "all" else str(kind)
    settings = ", ".join(f"{name} {value}" for name, value in kind.items() if name != "kind")
    return f"{kind['kind']} ({settings})" if settings else kind["kind"]
