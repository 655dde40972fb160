"""Read and write the weights of MIRAGE: the released Lightning ``.ckpt``, plain ``.pth``, and ``.safetensors``.

Files are read with ``weights_only=True``, so that no checkpoint can run code. Loading checks every key and shape first
and reports all problems in one `CheckpointError`; a model is never left half-loaded and a file never half-written.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mirage.model import MIRAGE, mirage_small, mirage_tiny

__all__ = ["CheckpointError", "from_checkpoint", "load_checkpoint", "save_checkpoint"]

PREFIXES = ("net.", "module.", "_orig_mod.")
CONFIG_KEY = "mirage_config"
BY_DIM = {24: mirage_tiny, 30: mirage_small}
LISTED = 8


class CheckpointError(RuntimeError):
    """A file that is no checkpoint, cannot be read safely, or does not fit the model."""


def load_checkpoint(path: str | os.PathLike[str], model: nn.Module | None = None) -> dict[str, Tensor]:
    """Read a checkpoint and return its state dict on the CPU, prefixes ``net.``, ``module.``, ``_orig_mod.`` stripped.

    Args:
        path: a ``.safetensors`` file, or anything ``torch.load`` reads: a state dict, or a mapping with one under
            ``state_dict`` (Lightning).
        model: also load the weights into this model, whose dtypes and devices are kept.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, needs unsafe unpickling, holds no state dict, or does not fit ``model``;
            then the message lists the missing, the unexpected and the mis-shaped keys, and the model is untouched.
    """
    state, _ = _read(Path(path))
    if model is not None:
        _load_into(model, state, path)
    return state


def from_checkpoint(path: str | os.PathLike[str], **overrides: Any) -> MIRAGE:
    """Build the model a checkpoint was made from, load it, and return it in eval mode on the CPU.

    A file written by `save_checkpoint` carries its arguments. Others are told apart by their shapes: dim 24 is
    MIRAGE-T, dim 30 MIRAGE-S; a checkpoint without any weight of the SPD head gives a model without one.

    Args:
        path: as for `load_checkpoint`.
        overrides: arguments of `MIRAGE` that leave the weights as they are, such as ``drop_path``.

    Raises:
        FileNotFoundError, CheckpointError: as `load_checkpoint`, or the shapes are those of neither model.
    """
    state, config = _read(Path(path))
    if config is not None:
        try:
            model = MIRAGE(**{**config, **overrides})
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: the arguments stored with the weights build no model: {error}") from error
    else:
        model = _build_by_shapes(state, path, overrides)
    _load_into(model, state, path)
    return model.eval()


def save_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the weights and, for a `MIRAGE`, its constructor arguments to a ``.safetensors`` file.

    The file appears under its name only when it is complete; an existing one is replaced in one step.

    Raises:
        ValueError: the name does not end in ``.safetensors``.
        FileNotFoundError: the folder does not exist.
    """
    import safetensors.torch

    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {str(path)!r}")
    state = _strip_prefixes(model.state_dict(), path)
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    metadata = {"format": "pt"}
    inner = _unwrap(model)
    if isinstance(inner, MIRAGE):
        metadata[CONFIG_KEY] = json.dumps(inner.config)
    _write_atomically(path, safetensors.torch.save(tensors, metadata))


def _unwrap(model: nn.Module) -> nn.Module:
    """The model inside DataParallel, DistributedDataParallel or torch.compile wrappers."""
    while not isinstance(model, MIRAGE):
        inner = getattr(model, "_orig_mod", getattr(model, "module", None))
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model


def _write_atomically(path: Path, data: bytes) -> None:
    target = Path(os.path.realpath(path))  # a symbolic link stays one
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The stripped state dict of a file and the constructor arguments stored with it, if any."""
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {str(path)!r}")
    if path.suffix == ".safetensors":
        state, config = _read_safetensors(path)
    else:
        state, config = _state_dict_of(_read_torch(path), path), None
    return _strip_prefixes(state, path), config


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    import safetensors

    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}
        config = json.loads(metadata[CONFIG_KEY]) if CONFIG_KEY in metadata else None
    except (safetensors.SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error
    if config is not None and not isinstance(config, dict):
        raise CheckpointError(f"{path}: the arguments stored with the weights must be a mapping, got {config!r}")
    return state, config


def _read_torch(path: Path) -> Any:
    try:
        # Lightning stores hyper-parameters as a Namespace, which holds attributes and runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"WeightsUnpickler error: ([^\n]*)", str(error))
        reason = found.group(1).split(" was not an allowed")[0].strip() if found else ""
        if "Unsupported global" not in reason:
            raise CheckpointError(f"{path}: damaged, or nothing that torch.load can read. {reason}".rstrip()) from error
        raise CheckpointError(
            f"{path}: holds other objects besides tensors and is not read, as unpickling them can run code "
            f"(weights_only=True says: {reason}). If you trust its source, extract the weights once: "
            'torch.save(torch.load(path, weights_only=False)["state_dict"], "weights.pth")'
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, IndexError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged, or nothing that torch.load can read. {error}".rstrip()) from error


def _state_dict_of(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in what a file held: the content itself, or its entry ``state_dict``."""
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content:
        got = "an empty mapping" if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(f"{path}: expected a state dict or a mapping with one under 'state_dict', got {got}")
    wrong = [repr(k) for k, v in content.items() if not (isinstance(k, str) and isinstance(v, Tensor))]
    if wrong:
        raise CheckpointError(f"{path}: a state dict maps names to tensors; these entries do not: {_some(wrong)}")
    return dict(content)


def _strip_prefixes(state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Remove the prefixes of wrappers, repeatedly and in any order."""
    stripped: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key
        while name.startswith(PREFIXES):
            name = name.split(".", 1)[1]
        if name in stripped:
            raise CheckpointError(f"{path}: more than one entry for {name!r} once the prefixes {PREFIXES} are stripped")
        stripped[name] = value
    return stripped


def _build_by_shapes(state: dict[str, Tensor], path: str | os.PathLike[str], overrides: dict[str, Any]) -> MIRAGE:
    stem = state.get("patch_embed.proj.weight")
    if stem is None or stem.ndim != 4:
        raise CheckpointError(
            f"{path}: expected 'patch_embed.proj.weight' of shape [dim, in_channels, 3, 3], "
            f"got {'no such key' if stem is None else list(stem.shape)}; the keys are {_some(list(state))}"
        )
    dim, in_channels = stem.shape[:2]
    if dim not in BY_DIM:
        raise CheckpointError(
            f"{path}: dim {dim} belongs to neither MIRAGE-T (24) nor MIRAGE-S (30); "
            "build the model yourself and call load_checkpoint(path, model)"
        )
    spd = any(key.startswith(("reduce_shallow.", "reduce_latent.", "spd_proj_")) for key in state)
    return BY_DIM[dim](**{"in_channels": in_channels, "spd": spd, **overrides})


def _load_into(model: nn.Module, state: dict[str, Tensor], path: str | os.PathLike[str]) -> None:
    model = _unwrap(model)
    own = model.state_dict()
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key} (expected {list(own[key].shape)}, got {list(state[key].shape)})"
        for key in own
        if key in state and own[key].shape != state[key].shape
    ]
    problems = [
        f"  {len(keys)} {what}: {_some(keys)}"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", shapes))
        if keys
    ]
    if problems:
        raise CheckpointError("\n".join([f"{path} does not fit {type(model).__name__}:", *problems]))
    model.load_state_dict(state, strict=True)


def _some(names: list[str]) -> str:
    more = f", and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
