"""Where the network sits in a file: under ``params``, behind a prefix ``net.``, beside a loss, beside its average.

A network is found by the names of its tensors. Wherever in nested mappings, and behind whatever prefix, at least half
of the expected names occur, there is one, and what else lies there is not part of it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mirage.checkpoint.errors import CheckpointError
from mirage.wording import counted

__all__ = ["MIRAGE_NAMES", "Network", "choose_network", "find_networks", "single_state_dict", "some", "unread_averages"]

MIRAGE_NAMES = ("patch_embed.proj.weight", "down1_2.body.0.weight", "reduce_chan_level3.weight", "output.weight")
"""Names of MIRAGE's tensors, whatever its sizes, one from each part of it."""

PREFIXES = ("net.", "module.", "_orig_mod.")
"""Prefixes that wrappers put before names, stripped where no network is found by its names."""

DEPTH = 4
LISTED = 8
UNREAD = 4  # so many tensors named as an average are one
AVERAGES = {"ema", "swa", "avg", "average", "averaged", "shadow"}
"""Words that name averaged weights: ``params_ema``, ``state_dict_ema``, ``emaModel``, ``shadow_params``."""

LIGHTNING_AVERAGING = {"state_dict", "current_model_state", "averaging_state"}
"""Keys by which Lightning's WeightAveraging is known, which puts the average under ``state_dict``."""


@dataclass(frozen=True)
class Network:
    """A network in a file.

    Attributes:
        path: keys of the mappings that lead to its mapping of tensors.
        prefix: what stands before the network's own names there, with its dot; ``""`` if nothing.
        state: the tensors under their own names.
        averaged: whether a word of :data:`AVERAGES` names it, or it is what an ``AveragedModel`` wraps, or what
            Lightning's WeightAveraging puts under ``state_dict``.
    """

    path: tuple[str, ...]
    prefix: str
    state: dict[str, Tensor]
    averaged: bool

    @property
    def name(self) -> str:
        """What `choose_network` calls it: path and prefix joined by dots."""
        return ".".join((*self.path, *([self.prefix[:-1]] if self.prefix else [])))


def find_networks(content: Any, names: Collection[str] = MIRAGE_NAMES, tensor: type = Tensor) -> list[Network]:
    """All networks with tensors of these names in a file's content.

    Args:
        content: what the file held: nested mappings with tensors in them, or anything else.
        names: of the tensors of one network.
        tensor: the type that counts as a tensor.
    """
    names = frozenset(names)
    by_lightning = isinstance(content, Mapping) and content.keys() >= LIGHTNING_AVERAGING
    found = []
    for path, tensors in _mappings(content, tensor):
        counts = Counter(prefix for key in tensors for prefix in _prefixes(key, names))
        prefixes = [prefix for prefix, count in counts.items() if 2 * count >= len(names)]
        for prefix in prefixes:
            inner = tuple(other for other in prefixes if other != prefix and other.startswith(prefix))
            state = {
                key[len(prefix) :]: value
                for key, value in tensors.items()
                if key.startswith(prefix) and not (inner and key.startswith(inner))
            }
            averaged = _is_average((*path, prefix), tensors, prefix) or (by_lightning and path == ("state_dict",))
            found.append(Network(path, prefix, state, averaged))
    return found


def choose_network(
    networks: Sequence[Network], key: str | None, path: Path, reader: str = "from_checkpoint"
) -> tuple[Network, str | None]:
    """The one network that is meant, and what its reader should be told where another one could have been.

    Equal weights under two names count once. Of two networks with the same names and shapes, one of them averaged
    (EMA), that one is taken, as BasicSR's and timm's loaders do.

    Args:
        networks: at least one.
        key: the name of one of them, or the only one whose name begins or ends with these parts; None: as above.
        path: of the file, for messages.
        reader: the function that reads one of them, for messages.

    Raises:
        CheckpointError: several are left, or none has that name; the message lists them and the call that reads one.
    """
    if key is not None:
        exact = [network for network in networks if network.name == key]
        loose = [n for n in networks if key and (n.name.startswith(f"{key}.") or n.name.endswith(f".{key}"))]
        if len(exact or loose) == 1:
            return (exact or loose)[0], None
        raise CheckpointError(
            _listing(networks, path, f"{'more than one network' if loose else 'nothing'} at {key!r}", reader)
        )
    distinct: list[Network] = []
    for network in networks:
        if not any(_same(network.state, other.state) for other in distinct):
            distinct.append(network)
    if len(distinct) == 1:
        return distinct[0], None
    averaged = [network for network in distinct if network.averaged]
    others = [network for network in distinct if not network.averaged]
    if len(averaged) == len(others) == 1 and _shapes(averaged[0].state) == _shapes(others[0].state):
        return averaged[0], (
            f"{path}: holds averaged weights (EMA) at {averaged[0].name!r} beside those at {others[0].name!r}; the "
            f"averaged ones are read. The others: {reader}({str(path)!r}, key={others[0].name!r})"
        )
    raise CheckpointError(
        _listing(distinct, path, f"{len(distinct)} networks, and which one is meant is not said", reader)
    )


def unread_averages(content: Any, networks: Sequence[Network], path: Path) -> str | None:
    """What to tell the reader of a file whose averaged weights are none of the networks: a list, other names."""
    if any(network.averaged for network in networks):
        return None
    counts: Counter[str] = Counter()
    for place, value in _leaves(content):
        if any(place[: len(network.path)] == network.path and _inside(place, network) for network in networks):
            continue
        named = next((i for i, part in enumerate(place) if _words(part) & AVERAGES), None)
        if named is not None:
            counts[".".join(place[: named + 1])] += value
    if not counts or max(counts.values()) < UNREAD:
        return None
    name, count = counts.most_common(1)[0]
    return (
        f"{path}: {count} tensors at {name!r} look like averaged weights (EMA), but not under the network's names; "
        "they are not read"
    )


def single_state_dict(content: Any, key: str | None, path: Path) -> tuple[dict[str, Tensor], str | None]:
    """The state dict in a file in which no network is found by its names, without the prefixes of wrappers.

    It is the entry `key`; or the content, or its entry ``state_dict``, or the only mapping with tensors in it. Averaged
    weights beside it are preferred as by `choose_network`, and what their reader should be told comes second.

    Raises:
        CheckpointError: there is none, or more than one.
    """
    found = [Network(at, "", tensors, _is_average(at, {}, "")) for at, tensors in _mappings(content, Tensor)]
    if key is not None:
        if not found:
            raise CheckpointError(f"{path}: nothing at {key!r}, and no tensors anywhere else")
        return _strip_prefixes(choose_network(found, key, path)[0].state, path), None
    note = None
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        first = [network for network in found if network.path == ("state_dict",)]
        content = content["state_dict"]
        averaged = [n for n in found if n.averaged and first and _shapes(n.state) == _shapes(first[0].state)]
        if averaged:
            network, note = choose_network([*first, *averaged], None, path)
            content = network.state
    elif found and found[0].path:
        network, note = choose_network(found, None, path)
        content = network.state
    if not isinstance(content, Mapping) or not content:
        got = "an empty mapping" if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(f"{path}: expected a state dict or a mapping with one under 'state_dict', got {got}")
    wrong = [repr(k) for k, v in content.items() if not (isinstance(k, str) and isinstance(v, Tensor))]
    if wrong:
        raise CheckpointError(f"{path}: a state dict maps names to tensors; these entries do not: {some(wrong)}")
    return _strip_prefixes(content, path), note


def some(names: Collection[Any]) -> str:
    """The first few names, and how many more there are."""
    more = f", and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(map(str, list(names)[:LISTED])) + more


def _mappings(
    content: Any, tensor: type, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """The named tensors of each mapping that has any, outer ones first."""
    if not isinstance(content, Mapping) or len(path) > DEPTH:
        return
    named = {key: value for key, value in content.items() if isinstance(key, str)}
    tensors = {key: value for key, value in named.items() if isinstance(value, tensor)}
    if tensors:
        yield path, tensors
    for key, value in named.items():
        yield from _mappings(value, tensor, (*path, key))


def _leaves(content: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], int]]:
    """Where there are tensors, and how many: the keys on the way, and the parts of the last one between its dots."""
    if isinstance(content, Mapping) and len(path) <= DEPTH:
        for key, value in content.items():
            if isinstance(key, str):
                is_leaf = isinstance(value, Tensor)
                yield from _leaves(value, (*path, *(key.split(".") if is_leaf else [key])))
    elif isinstance(content, Tensor):
        yield path, 1
    elif isinstance(content, list | tuple) and content and all(isinstance(value, Tensor) for value in content):
        yield path, len(content)


def _inside(place: tuple[str, ...], network: Network) -> bool:
    """Whether the tensor at this place, below the network's mapping, is one of the network's."""
    key = ".".join(place[len(network.path) :])
    return key.startswith(network.prefix) and key[len(network.prefix) :] in network.state


def _prefixes(key: str, names: Collection[str]) -> Iterator[str]:
    """What stands before a name in ``key``, for each of its ends that is one."""
    at = 0
    while True:
        if key[at:] in names:
            yield key[:at]
        dot = key.find(".", at)
        if dot < 0:
            return
        at = dot + 1


def _is_average(parts: Sequence[str], tensors: Mapping[str, Any], prefix: str) -> bool:
    if any(_words(part) & AVERAGES for part in parts):
        return True
    return prefix.endswith("module.") and prefix[: -len("module.")] + "n_averaged" in tensors


def _words(name: str) -> set[str]:
    """The words of ``state_dict_ema``, ``emaModel``, ``netEMA``, in lower case."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}


def _shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items()}


def _same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return _shapes(first) == _shapes(second) and all(torch.equal(value, second[name]) for name, value in first.items())


def _listing(networks: Sequence[Network], path: Path, found: str, reader: str) -> str:
    sizes = [sum(value.numel() for value in network.state.values()) for network in networks]
    lines = [
        f"  key={network.name!r}: {counted(len(network.state), 'tensor')}, {counted(size, 'value')}"
        for network, size in zip(networks, sizes, strict=True)
    ]
    call = f"{reader}({str(path)!r}, key={networks[0].name!r})"
    other = "load_checkpoint, or " if reader == "from_checkpoint" else ""
    advice = f"Read one with {call}, or {other}--key on the command line. There are:"
    return "\n".join([f"{path}: {found}. {advice}", *lines])


def _strip_prefixes(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
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
