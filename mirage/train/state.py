"""Checkpoints of training: everything that a run needs to go on as if it had not stopped.

A file is laid out as Lightning's Trainer writes one for the released code's module: the network under ``state_dict``
with the prefix ``net.``, ``optimizer_states``, ``global_step``, ``epoch``. That code resumes from it, and `read_state`
reads the files that it wrote. What is ours lies beside: the average under ``state_dict_ema``, the rest under
``mirage_train``.
"""

from __future__ import annotations

import io
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mirage.checkpoint import CheckpointError
from mirage.checkpoint.torch_files import read_torch_file
from mirage.whole_files import write_whole
from mirage.wording import counted

__all__ = ["State", "checkpoints", "read_state", "write_state"]

FORMAT = 2
PREFIX = "net."
LIGHTNING = "2.0.0"  # the oldest version whose layout this is


@dataclass
class State:
    """What a checkpoint holds.

    Attributes:
        step: optimizer steps done.
        samples: samples seen by all processes together; None: the file does not say (the released code's).
        seconds: of training so far.
        network: the network's state dict.
        average: that of the averaged weights; empty if there are none.
        optimizer: the optimizer's, weights by their number.
        config: the configuration; empty if the file has none.
        arguments: of `mirage.MIRAGE`; empty if the file has none.
        epoch: passes over the data, rounded down.
        scaler: of 16-bit floats' loss scaling.
    """

    step: int
    samples: int | None
    seconds: float
    network: dict[str, Tensor]
    average: dict[str, Tensor]
    optimizer: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    epoch: int = 0
    scaler: dict[str, Any] = field(default_factory=dict)


def checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints in a run's folder, oldest first."""
    return sorted(Path(folder).glob("step-*.ckpt"))


def write_state(state: State, folder: str | os.PathLike[str], keep: int) -> Path:
    """Write a checkpoint, whole or not at all, delete those before the last ``keep``, and return its path."""
    content = {
        "epoch": state.epoch,
        "global_step": state.step,
        "pytorch-lightning_version": LIGHTNING,
        "state_dict": {PREFIX + name: value for name, value in state.network.items()},
        "optimizer_states": [state.optimizer],
        "lr_schedulers": [],
        "mirage_train": {
            "format": FORMAT,
            "samples": state.samples,
            "seconds": state.seconds,
            "config": state.config,
            "network": state.arguments,
            "scaler": state.scaler,
        },
    }
    if state.average:
        content["state_dict_ema"] = {PREFIX + name: value for name, value in state.average.items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{state.step:08d}.ckpt"
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(path, buffer.getvalue())
    for old in checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def read_state(path: str | os.PathLike[str]) -> State:
    """Read a checkpoint of ours, or one that Lightning's Trainer wrote for the released code's module.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is truncated or damaged, holds no network under ``state_dict`` or no optimizer state.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {str(path)!r}")
    content = read_torch_file(path)
    missing = [key for key in ("state_dict", "optimizer_states", "global_step") if key not in content]
    if missing:
        raise CheckpointError(
            f"{path}: no checkpoint that training can go on from: it has no {', '.join(missing)}. "
            "To start from its weights alone: model.weights=FILE"
        )
    ours = content.get("mirage_train", {})
    if ours.get("format", 1) > FORMAT:
        raise CheckpointError(f"{path}: written by a later version (format {ours['format']}, known is {FORMAT})")
    samples = ours.get("samples")
    if samples is None and "config" in ours:  # format 1 had one batch size all through
        samples = content["global_step"] * ours["config"]["data"]["batch"]
    if len(content["optimizer_states"]) != 1:
        raise CheckpointError(f"{path}: expected the state of one optimizer, got {len(content['optimizer_states'])}")
    return State(
        step=content["global_step"],
        samples=samples,
        seconds=ours.get("seconds", 0.0),
        network=_network(content["state_dict"], path),
        average=_network(content["state_dict_ema"], path) if content.get("state_dict_ema") else {},
        optimizer=content["optimizer_states"][0],
        config=ours.get("config", {}),
        arguments=ours.get("network", {}),
        epoch=content.get("epoch", 0),
        scaler=ours.get("scaler", {}),
    )


def newest_state(folder: str | os.PathLike[str]) -> tuple[Path, State] | None:
    """The newest checkpoint of a folder; None where there is none.

    Raises:
        CheckpointError: it is damaged; the message says what to do.
    """
    files = checkpoints(folder)
    if not files:
        return None
    try:
        return files[-1], read_state(files[-1])
    except CheckpointError as error:
        before = f"delete it to go on from {files[-2].name}" if len(files) > 1 else "delete it to start anew"
        raise CheckpointError(f"{str(error).rstrip('.')}. It is the newest of its folder: {before}") from error


def _network(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    found = {name.removeprefix(PREFIX): value for name, value in tensors.items() if name.startswith(PREFIX)}
    if not found:
        raise CheckpointError(f"{path}: expected weights named {PREFIX}*, got {', '.join(list(tensors)[:4])}, ...")
    others = [name for name in tensors if not name.startswith(PREFIX)]
    if others:
        left_out = counted(len(others), "tensor")
        warnings.warn(f"{path}: left out {left_out} beside the network: {others[0]}, ...", stacklevel=3)
    return found
