"""Networks from files: which one it is need not be said."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mirage.checkpoint import CheckpointError, CheckpointWarning, from_content, is_mirage, load_into, read_content
from mirage.checkpoint.networks import choose_network, find_networks, single_state_dict, some, unread_averages
from mirage.model import MIRAGE
from mirage.networks.common import RestorationNetwork
from mirage.networks.identify import NAMES, Identified, identify
from mirage.networks.registry import NETWORKS, create, names
from mirage.whole_files import safetensors_bytes, write_whole

__all__ = ["NETWORK_KEY", "load", "metadata_of", "save"]

NETWORK_KEY = "mirage_network"
READER = "mirage.networks.load"


def load(
    weights: str | os.PathLike[str] | Mapping[str, Any], *, key: str | None = None, **overrides: Any
) -> RestorationNetwork | MIRAGE:
    """Build the network whose weights these are, load them, and return it in evaluation mode on the CPU.

    Which network it is, and with which arguments it was built, is told from the names and shapes of the weights, and
    for files of `save` from what they say. The weights may lie wherever `mirage.load_checkpoint` finds them: under
    ``params``, ``params_ema`` or ``state_dict``, behind ``net.`` or ``module.``, beside a loss. MIRAGE's own are
    handed to `mirage.from_checkpoint`.

    Args:
        weights: a file, ``.safetensors`` or what ``torch.load`` reads (with ``weights_only=True``); or what such a file
            holds, a state dict or a mapping with one in it.
        key: which network is meant where there are several, such as ``"params_ema"``.
        overrides: arguments of the network that leave the weights as they are, such as ``global_residual=False`` of an
            `SRResNet`, which no file tells.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, needs unsafe unpickling, holds no state dict or several networks (listed);
            or the weights are of none of these networks: then the message names the closest one, and the names that
            are missing, unexpected or of another shape.
        ValueError: the network has no such argument.

    Warns:
        CheckpointWarning: averaged weights were preferred to others, or could not be read.
    """
    if isinstance(weights, Mapping):
        path, content, config, stored = Path("state dict"), weights, None, None
    else:
        path = Path(weights)
        content, config = read_content(path)
        stored = _stored(path) or _trained(content)
    if config is not None:
        return from_content(content, config, path, key, overrides)
    state, note = _state_in(content, key, path)
    if is_mirage(state):
        return from_content(content, config, path, key, overrides)
    if note is not None:
        warnings.warn(note, CheckpointWarning, stacklevel=2)
    network = _build(state, stored, path, overrides)
    network.to_empty(device="cpu")
    load_into(network, state, path)
    return network.eval()


def save(network: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the weights of a network, and its name and arguments, to a ``.safetensors`` file that `load` reads.

    Of a wrapper (``DataParallel``, ``torch.compile``, ``AveragedModel``) the network inside is written. The file
    appears under its name only when it is complete; an existing one is replaced in one step.

    Raises:
        ValueError: the name does not end in ``.safetensors``, or it is none of these networks (`mirage.save_checkpoint`
            writes MIRAGE's), or its weights are not those that its arguments ask for.
        FileNotFoundError: the folder does not exist.
    """
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {str(path)!r}")
    while not isinstance(network, RestorationNetwork):
        inner = getattr(network, "_orig_mod", getattr(network, "module", None))
        if not isinstance(inner, nn.Module):
            raise ValueError(f"network: expected one of {', '.join(names())}, got {type(network).__name__}")
        network = inner
    state = network.state_dict()
    name = _name_of(network)
    with torch.device("meta"):
        expected = create(name, **network.config).state_dict()
    if {k: v.shape for k, v in expected.items()} != {k: v.shape for k, v in state.items()}:
        raise ValueError(f"network: its weights are not those of {name} with its config, which load would build")
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    write_whole(path, safetensors_bytes(tensors, metadata_of(network)))


def metadata_of(network: RestorationNetwork) -> dict[str, str]:
    """What `save` writes beside the weights."""
    stored = {"name": _name_of(network), "arguments": network.config}
    return {"format": "pt", NETWORK_KEY: json.dumps(stored)}


def _name_of(network: RestorationNetwork) -> str:
    name = next((name for name, kind in NETWORKS.items() if isinstance(network, kind)), None)
    if name is None:
        raise ValueError(f"network: expected one of {', '.join(names())}, got {type(network).__name__}")
    return name


def _state_in(content: Any, key: str | None, path: Path) -> tuple[dict[str, Tensor], str | None]:
    """The state dict of the network in a file's content, and what its reader should be told."""
    for known in NAMES.values():
        networks = find_networks(content, known)
        if networks:
            network, note = choose_network(networks, key, path, READER)
            return network.state, note or (unread_averages(content, networks, path) if key is None else None)
    return single_state_dict(content, key, path)


def _stored(path: Path) -> dict[str, Any] | None:
    """What `save` wrote beside the weights."""
    if path.suffix != ".safetensors":
        return None
    import safetensors

    with safetensors.safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(NETWORK_KEY)
    if text is None:
        return None
    try:
        stored = json.loads(text)
        return {"name": str(stored["name"]), "arguments": dict(stored["arguments"])}
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: {NETWORK_KEY}: expected a name and arguments, got {text!r}") from error


def _trained(content: Any) -> dict[str, Any] | None:
    """What a checkpoint of `mirage.train` says of a network that is none of MIRAGE's."""
    try:
        ours = content["mirage_train"]
        name, arguments = ours["config"]["model"]["network"], ours["network"]
    except (KeyError, TypeError):
        return None
    return {"name": name, "arguments": dict(arguments)} if name in NETWORKS else None


def _build(
    state: dict[str, Tensor], stored: dict[str, Any] | None, path: Path, overrides: dict[str, Any]
) -> RestorationNetwork:
    """The network, on the meta device."""
    found = identify(state) if stored is None else Identified(stored["name"], stored["arguments"], {})
    if found.problems:
        lines = [f"  {len(keys)} {what}: {some(keys)}" for what, keys in found.problems.items()]
        kind = NETWORKS[found.name].__name__
        known = ", ".join(kind.__name__ for kind in NETWORKS.values())
        raise CheckpointError(
            "\n".join(
                [
                    f"{path}: the weights of none of the networks that are known (MIRAGE, {known}). The closest is "
                    f"{kind}, of which there are",
                    *lines,
                ]
            )
        )
    with torch.device("meta"):
        try:
            return create(found.name, **{**found.arguments, **overrides})
        except ValueError as error:
            if overrides:
                raise
            raise CheckpointError(f"{path}: what is stored with the weights builds no network: {error}") from error
