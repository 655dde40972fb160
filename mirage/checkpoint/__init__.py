"""Read and write the weights of MIRAGE: the released Lightning ``.ckpt``, plain ``.pth``, and ``.safetensors``.

Files are read with ``weights_only=True``, so that no checkpoint can run code. Loading checks every key and shape first
and reports all problems in one `CheckpointError`; a model is never left half-loaded and a file never half-written.

Where the network sits in a file need not be said: the state dict itself; an entry of a mapping (``state_dict``,
``params``, ``model``, ``generator``, ...); behind a prefix (``net.``, ``model.``, ``module.``, ``net_g.``, ...), with a
loss or another network beside it. Where a file holds two networks with the same names and shapes, and the name of one
says that it is averaged (``params_ema``, ``state_dict_ema``, ``ema.net``), the averaged one is read, with a
`CheckpointWarning` that says so, as the loaders of BasicSR and timm do. In all other cases a file with several is
refused with a list of them, and ``key`` says which one is meant.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mirage.checkpoint.errors import CheckpointError, CheckpointWarning
from mirage.checkpoint.networks import (
    MIRAGE_NAMES,
    choose_network,
    find_networks,
    single_state_dict,
    some,
    unread_averages,
)
from mirage.checkpoint.shapes import arguments_by_shapes, head_of_another_size, misfits, without_head
from mirage.checkpoint.torch_files import read_torch_file
from mirage.model import MIRAGE, mirage_small, mirage_tiny
from mirage.whole_files import safetensors_bytes, write_whole

__all__ = ["CheckpointError", "CheckpointWarning", "from_checkpoint", "load_checkpoint", "save_checkpoint"]

CONFIG_KEY = "mirage_config"
STEM = "patch_embed.proj.weight"
BY_DIM = {24: mirage_tiny, 30: mirage_small}


def load_checkpoint(
    path: str | os.PathLike[str], model: nn.Module | None = None, *, key: str | None = None
) -> dict[str, Tensor]:
    """Read a checkpoint and return the network's state dict on the CPU, under the network's own names.

    Args:
        path: a ``.safetensors`` file, or anything ``torch.load`` reads: a state dict, or mappings with one in them.
        model: also load the weights into this model, whose dtypes and devices are kept. The names of its tensors are
            then those looked for, and those of MIRAGE otherwise. Of a wrapper (``DataParallel``, ``torch.compile``,
            ``AveragedModel``) the model inside is meant; of a training module, the MIRAGE in it, unless the file holds
            the module's own weights.
        key: which network is meant where the file holds several, such as ``"params_ema"`` or ``"state_dict.net"``.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, needs unsafe unpickling, holds no state dict or several networks (listed),
            or does not fit ``model``; then the message lists the missing, the unexpected and the mis-shaped keys, and
            the model is untouched.

    Warns:
        CheckpointWarning: averaged weights were preferred to others, or could not be read.
    """
    path = Path(path)
    content, _ = read_content(path)
    if model is None:
        return _network_state(content, MIRAGE_NAMES, key, path)
    target = _unwrap(model)
    inner = _mirages(target)
    if not find_networks(content, target.state_dict()) and len(inner) == 1:
        (target,) = inner.values()
    state = _network_state(content, target.state_dict(), key, path)
    load_into(target, state, path)
    return state


def from_checkpoint(path: str | os.PathLike[str], *, key: str | None = None, **overrides: Any) -> MIRAGE:
    """Build the model a checkpoint was made from, load it, and return it in eval mode on the CPU.

    A file written by `save_checkpoint` carries its arguments. Those of others are read from the shapes of their
    weights: MIRAGE-T, MIRAGE-S, or whatever size it is, then with a warning that says which. A checkpoint without any
    weight of the SPD head gives a model without one.

    Args:
        path, key: as for `load_checkpoint`.
        overrides: arguments of `MIRAGE` that leave the weights as they are, such as ``drop_path``.

    Raises:
        FileNotFoundError, CheckpointError: as `load_checkpoint`, or the names and shapes are those of no MIRAGE.

    Warns:
        CheckpointWarning: averaged weights were preferred to others, or could not be read; the network is neither
            MIRAGE-T nor MIRAGE-S, and nothing but its shapes says which; or its SPD head, one of another size, as the
            released code builds it for all sizes, was left out.
    """
    path = Path(path)
    content, config = read_content(path)
    return from_content(content, config, path, key, overrides)


def from_content(
    content: Any, config: dict[str, Any] | None, path: Path, key: str | None, overrides: dict[str, Any]
) -> MIRAGE:
    """`from_checkpoint` of what `read_content` has read from ``path``."""
    state = _network_state(content, MIRAGE_NAMES, key, path, stacklevel=4)
    if config is not None:
        try:
            model = MIRAGE(**{**config, **overrides})
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: the arguments stored with the weights build no model: {error}") from error
    else:
        model, state = _build_by_shapes(state, path, overrides)
    load_into(model, state, path)
    return model.eval()


def save_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the weights of a network and, for a `MIRAGE`, its constructor arguments to a ``.safetensors`` file.

    Of a wrapper (``DataParallel``, ``torch.compile``, ``AveragedModel``) the model inside is written; of a training
    module, the MIRAGE in it, without the loss or the optimizer's averages beside it: what `from_checkpoint` reads back.
    So it does with the released code's own class, of any size, whose arguments are read from the shapes of its weights;
    where they are those of no `MIRAGE` (biases, other norms), only `load_checkpoint` reads the file, into that class.
    The weights of a module without any MIRAGE are written as they are; `load_checkpoint` reads them into such a module.
    The file appears under its name only when it is complete; an existing one is replaced in one step.

    Raises:
        ValueError: the name does not end in ``.safetensors``; or the module holds several MIRAGE networks (listed); or
            its weights are not those of a MIRAGE, as where modules were parametrized, pruned or replaced.
        FileNotFoundError: the folder does not exist.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {str(path)!r}")
    metadata = {"format": "pt"}
    inner = _to_save(model)
    if isinstance(inner, MIRAGE):
        _check_rebuildable(inner)
        metadata[CONFIG_KEY] = json.dumps(inner.config)
        state = inner.state_dict()
    else:
        networks = find_networks(inner.state_dict())  # of the authors' own code, by its names
        if len(networks) > 1:
            raise _several([network.name for network in networks])
        state = networks[0].state if networks else inner.state_dict()
        arguments = _foreign_arguments(inner, state)
        if arguments is not None:
            metadata[CONFIG_KEY] = json.dumps(arguments)
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}  # tied ones share memory
    write_whole(path, safetensors_bytes(tensors, metadata))


def _unwrap(model: nn.Module) -> nn.Module:
    """The model inside DataParallel, DistributedDataParallel, AveragedModel or torch.compile wrappers."""
    while not isinstance(model, MIRAGE):
        inner = getattr(model, "_orig_mod", getattr(model, "module", None))
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model


def _mirages(model: nn.Module) -> dict[str, MIRAGE]:
    """Every MIRAGE in a module, by the name of its place."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MIRAGE)}


def _to_save(model: nn.Module) -> nn.Module:
    model = _unwrap(model)
    inner = _mirages(model)
    if len(inner) > 1:
        raise _several(list(inner))
    return next(iter(inner.values()), model)


def _several(names: list[str]) -> ValueError:
    places = ", ".join(f"model.{name}" if name else "model" for name in names)
    return ValueError(f"model holds {len(names)} MIRAGE networks, save one of them: {places}")


def _check_rebuildable(model: MIRAGE) -> None:
    """Refuse a model whose weights are no longer those that its arguments ask for."""
    with torch.device("meta"):
        expected = {name: value.shape for name, value in MIRAGE(**model.config).state_dict().items()}
    actual = {name: value.shape for name, value in model.state_dict().items()}
    if expected != actual:
        other = [name for name in {**actual, **expected} if actual.get(name) != expected.get(name)]
        raise ValueError(
            f"model: {len(other)} weights are not those of MIRAGE(**model.config), which from_checkpoint would build: "
            f"{some(other)}. Remove parametrizations and pruning first, or save model.state_dict() with torch.save"
        )


def _foreign_arguments(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Any] | None:
    """Arguments of the `MIRAGE` that computes what another class with the same weights does; None where none does."""
    if STEM not in state or state[STEM].ndim != 4:
        return None
    arguments = arguments_by_shapes(state)
    if misfits(state, arguments):
        return None
    depths: set[Any] = {m.drop_prob for m in model.modules() if isinstance(getattr(m, "drop_prob", None), float)}
    return MIRAGE(**arguments, **({"drop_path": depths.pop()} if len(depths) == 1 else {})).config


def read_content(path: Path) -> tuple[Any, dict[str, Any] | None]:
    """What a file holds, and the constructor arguments of a MIRAGE stored with it, if any.

    Raises:
        FileNotFoundError, CheckpointError: as `load_checkpoint` does.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {str(path)!r}")
    return _read_safetensors(path) if path.suffix == ".safetensors" else (read_torch_file(path), None)


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


def _network_state(
    content: Any, names: Collection[str], key: str | None, path: Path, stacklevel: int = 3
) -> dict[str, Tensor]:
    """The state dict of the network with these names in a file's content, or of the only one; warns of averages."""
    networks = find_networks(content, names)
    if networks:
        network, note = choose_network(networks, key, path)
        state = network.state
        if key is None:
            note = note or unread_averages(content, networks, path)
    else:
        state, note = single_state_dict(content, key, path)
    if note is not None:
        warnings.warn(note, CheckpointWarning, stacklevel=stacklevel)
    return state


def is_mirage(state: Mapping[str, Any]) -> bool:
    """Whether these are names of a MIRAGE, which alone of Restormer's descendants has gated CNNs in its blocks."""
    return any(".attn.gatedcnn." in name for name in state)


def _build_by_shapes(
    state: dict[str, Tensor], path: Path, overrides: dict[str, Any]
) -> tuple[MIRAGE, dict[str, Tensor]]:
    """The model that the shapes ask for, and those of the weights that belong to it."""
    stem = state.get(STEM)
    if stem is None or stem.ndim != 4:
        raise CheckpointError(
            f"{path}: expected {STEM!r} of shape [dim, in_channels, 3, 3], "
            f"got {'no such key' if stem is None else list(stem.shape)}; the keys are {some(state)}"
        )
    if any(name.endswith(".attn.qkv.weight") for name in state) and not is_mirage(state):
        raise CheckpointError(
            f"{path}: no MIRAGE, but a network like Restormer: its blocks have no gated CNN "
            "(attn.gatedcnn). mirage.networks.load(path) reads those that are known"
        )
    other_head = head_of_another_size(state)
    if other_head is not None:
        state = without_head(state)
        _warn(f"{path}: the SPD head is of another size ({other_head}), and is left out")
    arguments = arguments_by_shapes(state)
    dim = arguments["dim"]
    wrong = misfits(state, arguments)
    if dim in BY_DIM:
        with torch.device("meta"):
            known = BY_DIM[dim](in_channels=arguments["in_channels"], spd=arguments["spd"]).config
        if len(misfits(state, known)) <= len(wrong):
            return MIRAGE(**{**known, **overrides}), state
    elif wrong:
        raise CheckpointError(
            f"{path}: dim {dim} belongs to neither MIRAGE-T (24) nor MIRAGE-S (30), and to no MIRAGE of another size, "
            f"which would have others than {some(wrong)}; build the model yourself, then load_checkpoint(path, model)"
        )
    if not wrong:  # else loading says what
        sizes = ", ".join(
            f"{name}={arguments[name]}" for name in ("dim", "num_blocks", "num_refinement_blocks", "heads")
        )
        _warn(f"{path}: neither MIRAGE-T nor MIRAGE-S; by its shapes MIRAGE({sizes})")
    return MIRAGE(**{**arguments, **overrides}), state


def _warn(message: str) -> None:
    warnings.warn(message, CheckpointWarning, stacklevel=5)


def differences(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """What keeps a state dict from a model: names that are ``"missing"``, ``"unexpected"``, and of another shape
    (``"mis-shaped"``); empty where it fits."""
    own = model.state_dict()
    found = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "mis-shaped": [
            f"{key} (expected {list(own[key].shape)}, got {list(state[key].shape)})"
            for key in own
            if key in state and own[key].shape != state[key].shape
        ],
    }
    return {what: keys for what, keys in found.items() if keys}


def load_into(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load a state dict into a model, or raise CheckpointError with all that does not fit, the model untouched."""
    problems = differences(model, state)
    if problems:
        lines = [f"  {len(keys)} {what}: {some(keys)}" for what, keys in problems.items()]
        raise CheckpointError("\n".join([f"{path} does not fit {type(model).__name__}:", *lines]))
    model.load_state_dict(state, strict=True)
