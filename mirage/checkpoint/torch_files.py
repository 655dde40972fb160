"""Read what ``torch.save`` wrote, without running anything that is in it.

Weights come from ``torch.load(weights_only=True)``. Paths, NumPy numbers, dates and other harmless values beside them
become inert stand-ins, so that neither NumPy nor the system the file was written on is needed, and nothing of theirs is
called. A file with anything else is refused, and how its weights can be extracted is read from the outline of its
pickle, in which every class is such a stand-in.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mirage.checkpoint.errors import CheckpointError
from mirage.checkpoint.networks import find_networks

__all__ = ["read_torch_file"]

_NUMBERS = "bool bool_ int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 longdouble complex64 "
_NUMPY = "numpy.dtype numpy.ndarray numpy.str_ numpy.bytes_ numpy.datetime64 numpy.timedelta64"
_NUMPY_PRIVATE = "multiarray.scalar multiarray._reconstruct numeric._frombuffer"
_PATHS = "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath"
HARMLESS = (
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in _PATHS.split()),
    *(f"numpy.{name}" for name in (_NUMBERS + "complex128").split()),
    *_NUMPY.split(),
    *(f"numpy.{core}.{name}" for core in ("core", "_core") for name in _NUMPY_PRIVATE.split()),
    *(f"datetime.{name}" for name in "datetime date time timedelta timezone tzinfo".split()),
    *(f"builtins.{name}" for name in "bool bytes dict float frozenset int list object range slice str tuple".split()),
    "argparse.Namespace",
    "decimal.Decimal",
    "fractions.Fraction",
    "types.SimpleNamespace",
    "uuid.UUID",
    "zoneinfo.ZoneInfo._unpickle",
)
"""Types whose values are passed over where they lie beside weights."""

CONTAINERS = {"collections.defaultdict": dict, "collections.deque": list}
"""Types whose contents are kept: as what they are called with nothing else."""


class _Inert:
    """Stands in for an object of another class: takes whatever that is made of, and does nothing."""

    state: Any = None

    def __new__(cls, *_args: Any, **_kwargs: Any) -> _Inert:
        return object.__new__(cls)

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    extend = add = append
    __hash__ = object.__hash__


class _TensorOutline(_Inert):
    """Stands in for a tensor."""


def read_torch_file(path: Path) -> Any:
    """What the file holds, on the CPU.

    Raises:
        CheckpointError: the file is damaged or of another kind, or holds objects whose unpickling can run code.
    """
    try:
        with torch.serialization.safe_globals(_stand_ins()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"WeightsUnpickler error: ([^\n]*)", str(error))
        reason = found.group(1).split(" was not an allowed")[0].strip() if found else ""
        if "Unsupported global" not in reason:
            raise CheckpointError(f"{path}: damaged, or nothing that torch.load can read. {reason}".rstrip()) from error
        raise CheckpointError(
            f"{path}: holds other objects besides tensors and is not read, as unpickling them can run code "
            f"(weights_only=True says: {reason}). {_advice(path)}"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, IndexError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged, or nothing that torch.load can read. {error}".rstrip()) from error


def _stand_ins() -> list[Any]:
    """What `torch.serialization.safe_globals` is to use for the harmless types: found by module and name."""
    stand_ins: list[Any] = []
    for full_name in HARMLESS:
        module, name = full_name.rsplit(".", 1)
        stand_ins.append(type(name, (_Inert,), {"__module__": module, "__qualname__": name}))
    for full_name, container in CONTAINERS.items():
        module, name = full_name.rsplit(".", 1)
        stand_ins.append(_maker(module, name, container))
    return stand_ins


def _maker(module: str, name: str, container: type) -> Any:
    def make(*_args: Any) -> Any:
        return container()

    make.__module__, make.__name__, make.__qualname__ = module, name, name
    return make


def _advice(path: Path) -> str:
    """The line of Python that extracts the weights of this file, as far as its outline tells."""
    output = str(path.with_name(path.stem + "-weights.pth"))
    try:
        expression = _extraction(_outline(path))
    except Exception:  # what a damaged or foreign pickle raises is of no interest: the file is refused already
        expression = None
    if expression is None:
        return "If you trust its source, load it there and save model.state_dict() alone."
    return (
        "If you trust its source, extract the weights once, where its classes can be imported: "
        f"import torch; content = torch.load({str(path)!r}, map_location='cpu', weights_only=False); "
        f"torch.save({expression}, {output!r})"
    )


def _extraction(content: Any) -> str | None:
    """The expression for the weights in ``content``, of which this is the outline; None where there are none."""
    if _is_module(content):
        return "content.state_dict()"
    if not isinstance(content, Mapping):
        return None
    places: dict[str, str] = {}
    for network in find_networks(content, tensor=_TensorOutline):
        place = "content" + "".join(f"[{key!r}]" for key in network.path)
        whole = f"{{k: v for k, v in {place}.items() if isinstance(v, torch.Tensor)}}"
        places[".".join(network.path) or "weights"] = place if network.path else whole
    for key, value in content.items():
        if _is_module(value):
            places[str(key)] = f"content[{key!r}].state_dict()"
    if not places and isinstance(content.get("state_dict"), Mapping):
        places["state_dict"] = "content['state_dict']"
    if len(places) < 2:
        return next(iter(places.values()), None)
    return "{" + ", ".join(f"{name!r}: {place}" for name, place in places.items()) + "}"


def _is_module(value: Any) -> bool:
    state = value.state if isinstance(value, _Inert) else None
    return isinstance(state, Mapping) and "_parameters" in state and "_modules" in state


class _OutlineUnpickler(pickle.Unpickler):
    """Every class is a stand-in: calls nothing that the file names."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if f"{module}.{name}" in CONTAINERS:
            return _maker(module, name, CONTAINERS[f"{module}.{name}"])
        is_tensor = module == "torch._utils" and name.startswith("_rebuild")
        return type(name, (_TensorOutline if is_tensor else _Inert,), {})

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, tuple) and len(pid) > 1 and pid[0] == "module":  # older files: a class and its source
            return pid[1]
        return _Inert()


def _outline(path: Path) -> Any:
    """The file's content with stand-ins for all objects but mappings, lists, text and numbers."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            return _OutlineUnpickler(io.BytesIO(archive.read(name))).load()
    with open(path, "rb") as file:
        for _ in range(3):  # a magic number, the version, sizes of types
            _OutlineUnpickler(file).load()
        return _OutlineUnpickler(file).load()
