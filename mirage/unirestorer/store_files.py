"""The folder of an `ExpertStore`: a file for the base, one for each expert that is not the base itself, and
``experts.json``, which is written last and names them.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mirage.unirestorer.lora_files import LORA_KEY
from mirage.unirestorer.mapped import Weights
from mirage.whole_files import safetensors_bytes, write_whole

if TYPE_CHECKING:
    from mirage.unirestorer.store import Expert, ExpertStore

__all__ = ["MANIFEST", "StoredExperts", "read_store", "save_store"]

FORMAT = "mirage expert store, version 1"
MANIFEST = "experts.json"
KINDS = ("base", "lora", "full")


@dataclass(frozen=True)
class StoredExperts:
    """What a folder holds: the base's file, and the experts by name."""

    base: Path
    experts: Mapping[str, Expert]


def save_store(store: ExpertStore, folder: Path) -> None:
    """See `ExpertStore.save`."""
    folder.mkdir(parents=True, exist_ok=True)
    earlier = _named_in(folder)
    if store._weights.path is not None:
        base = _write("base", store._weights.checked().read_bytes(), folder, store._weights.path.suffix)
    else:
        base = _write("base", _network_bytes(store.base_network(), "base"), folder)
    entries = {}
    for name in store.names:
        expert = store._experts[name]
        entries[name] = {"kind": expert.kind}
        if expert.kind != "base":
            data, suffix = _bytes_of(expert, name)
            entries[name]["file"] = _write(name, data, folder, suffix)
    content = {"format": FORMAT, "base": base, "experts": entries}
    write_whole(folder / MANIFEST, (json.dumps(content, indent=1) + "\n").encode("utf-8"))
    for name in earlier - {base, *(entry["file"] for entry in entries.values() if "file" in entry)}:
        (folder / name).unlink(missing_ok=True)


def read_store(folder: Path) -> StoredExperts:
    """What `save_store` has written; no weights are read.

    Raises:
        FileNotFoundError, ValueError: as `ExpertStore.load`.
    """
    from mirage.unirestorer.store import Expert

    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"no experts in {os.fspath(folder)!r}: it has no {MANIFEST}")
    try:
        content = _content(path)
        base = folder / _file_name(content["base"])
        experts = {}
        for name, entry in content["experts"].items():
            if entry["kind"] not in KINDS:
                raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {entry['kind']!r}")
            place = None if entry["kind"] == "base" else folder / _file_name(entry["file"])
            experts[name] = (entry["kind"], place)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: not readable as a store of experts: {error!r}") from error
    for place in (base, *(place for _, place in experts.values())):
        if place is not None and not place.is_file():
            raise FileNotFoundError(f"{path}: names {place.name}, which is not there")
    return StoredExperts(base, {name: _expert(Expert, kind, place) for name, (kind, place) in experts.items()})


def _expert(new: type[Expert], kind: str, place: Path | None) -> Expert:
    if place is None:
        return new(kind)
    weights = Weights.at(place)
    header = weights.header(LORA_KEY) if kind == "lora" else None
    if kind == "lora" and header is None:
        raise ValueError(f"{place}: expected a file of save_lora, it has no rank and alpha")
    return new(kind, weights, header or {})


def _content(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"expected the format {FORMAT!r}")
    return content


def _file_name(name: Any) -> str:
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
        raise ValueError(f"file: expected the name of a file in the folder, got {name!r}")
    return name


def _named_in(folder: Path) -> set[str]:
    """The files of a store that is there, which are to go once it is replaced; none of anything else."""
    try:
        content = _content(folder / MANIFEST)
        files = [content["base"], *(entry["file"] for entry in content["experts"].values() if "file" in entry)]
        return {_file_name(name) for name in files}
    except (OSError, KeyError, TypeError, AttributeError, ValueError):
        return set()


def _write(name: str, data: bytes, folder: Path, suffix: str = ".safetensors") -> str:
    """Write a file whose name says what it holds, unless it is there; returns the name."""
    file = f"{name}-{_digest_of(data, suffix)[:16]}{suffix}"
    path = folder / file
    if not path.is_file() or path.stat().st_size != len(data):
        write_whole(path, data)
    return file


def _digest_of(data: bytes, suffix: str) -> str:
    """Of what a file holds: safetensors writes what is said beside the tensors in another order each time."""
    digest = hashlib.sha256()
    if suffix == ".safetensors":
        end = 8 + int.from_bytes(data[:8], "little")
        digest.update(json.dumps(json.loads(data[8:end]), sort_keys=True).encode())
        data = data[end:]
    digest.update(data)
    return digest.hexdigest()


def _bytes_of(expert: Expert, name: str) -> tuple[bytes, str]:
    """The file of an expert, and its suffix."""
    if expert.network is not None:
        return _network_bytes(expert.network, f"expert {name}"), ".safetensors"
    assert expert.weights is not None
    if expert.weights.path is not None:
        return expert.weights.checked().read_bytes(), expert.weights.path.suffix
    tensors: dict[str, Tensor] = {n: v.cpu().contiguous() for n, v in (expert.weights.tensors or {}).items()}
    header = {"format": "pt", LORA_KEY: json.dumps(dict(expert.header))}
    return safetensors_bytes(tensors, header), ".safetensors"


def _network_bytes(network: nn.Module, what: str) -> bytes:
    """A file that `mirage.networks.load` reads back as this network."""
    import mirage
    from mirage import networks

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "network.safetensors"
        if isinstance(network, mirage.MIRAGE):
            mirage.save_checkpoint(network, path)
        elif isinstance(network, networks.RestorationNetwork):
            networks.save(network, path)
        else:
            known = ", ".join(["mirage", *networks.names()])
            raise ValueError(f"{what}: expected one of {known} to be saved, got {type(network).__name__}")
        return path.read_bytes()
