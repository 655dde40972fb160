"""Networks as their authors' own code builds them, from checkouts that the user has.

Nothing of that code is in this package. A checkout is run as it is found, so it has to be trusted as any program does.
What such a file imports and the network does without (a registry, a FLOP counter, deformable convolutions) is replaced
while it loads; einops, which most of them compute with, has to be installed.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

from torch import nn

from mirage.extras import is_there

__all__ = ["SOURCES", "Source", "class_of", "create", "missing"]


@dataclass(frozen=True)
class Source:
    """Where a network is defined.

    Attributes:
        repository: on GitHub; a checkout of it lies under its last name.
        file: in the checkout.
        kind: name of the class.
        arguments: with which the published network is built.
        needs: modules of the same checkout that the file imports and cannot do without.
        packages: what has to be installed.
    """

    repository: str
    file: str
    kind: str
    arguments: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    needs: tuple[str, ...] = ()
    packages: tuple[str, ...] = ("einops",)

    @property
    def folder(self) -> str:
        """The name of its checkout."""
        return self.repository.rpartition("/")[2]


def _moce_ir(dim: int) -> Source:
    arguments = {
        "dim": dim,
        "num_blocks": [4, 6, 6, 8],
        "num_dec_blocks": [2, 4, 4],
        "num_refinement_blocks": 4,
        "heads": [1, 2, 4, 8],
        "stage_depth": [1, 1, 1],
        "depth_type": "constant",
        "rank_type": "spread",
        "with_complexity": True,
    }
    return Source("eduardzamfir/MoCE-IR", "src/net/moce_ir.py", "MoCEIR", arguments)


SOURCES: Mapping[str, Source] = {
    "adair": Source("c-yn/AdaIR", "net/model.py", "AdaIR", {"decoder": True}),
    "moce-ir": _moce_ir(48),
    "moce-ir-s": _moce_ir(32),
    "nafnet": Source(
        "megvii-research/NAFNet",
        "basicsr/models/archs/NAFNet_arch.py",
        "NAFNet",
        {"width": 32, "enc_blk_nums": [2, 2, 4, 8], "middle_blk_num": 12, "dec_blk_nums": [2, 2, 2, 2]},
        needs=("basicsr.models.archs.arch_util",),
        packages=(),
    ),
    "promptir": Source("va1shn9v/PromptIR", "net/model.py", "PromptIR", {"decoder": True}),
    "restormer": Source("swz30/Restormer", "basicsr/models/archs/restormer_arch.py", "Restormer"),
    "srresnet": Source(
        "XPixelGroup/BasicSR",
        "basicsr/archs/srresnet_arch.py",
        "MSRResNet",
        needs=("basicsr.archs.arch_util",),
        packages=(),
    ),
}
"""The published networks by our names for them."""


class _Registry:
    """Stands in for BasicSR's: a decorator that leaves the class as it is."""

    def register(self) -> Any:
        return lambda kind: kind


_SUBSTITUTES: dict[str, dict[str, Any]] = {
    "basicsr": {},
    "basicsr.archs": {},
    "basicsr.models": {},
    "basicsr.models.archs": {},
    "basicsr.models.archs.local_arch": {"Local_Base": type("Local_Base", (nn.Module,), {})},
    "basicsr.ops": {},
    "basicsr.ops.dcn": {"ModulatedDeformConvPack": nn.Module, "modulated_deform_conv": None},
    "basicsr.utils": {"get_root_logger": None},
    "basicsr.utils.registry": {"ARCH_REGISTRY": _Registry()},
    "fvcore": {},
    "fvcore.nn": {"FlopCountAnalysis": None, "flop_count_table": None},
    "torchvision": {"__version__": "0.20.0"},
}


def missing(name: str, folder: str | os.PathLike[str] | None) -> str:
    """Why a published network cannot be built; empty where it can.

    Args:
        name: one of `SOURCES`.
        folder: has the checkouts, under the names of their repositories; None where there are none.

    Raises:
        ValueError: there is no network of that name.
    """
    source = _source(name)
    if folder is None or not (Path(folder) / source.folder / source.file).is_file():
        what = "no folder of checkouts was given" if folder is None else f"no {source.folder}/{source.file} in {folder}"
        return f"{what}; it is in github.com/{source.repository}"
    absent = [package for package in source.packages if not is_there(package)]
    return f"its code needs {', '.join(absent)} (pip install {' '.join(absent)})" if absent else ""


def create(name: str, folder: str | os.PathLike[str], **arguments: Any) -> nn.Module:
    """Build a network by its authors' code, with random weights, in training mode on the CPU.

    Args:
        name: one of `SOURCES`.
        folder: has the checkouts, under the names of their repositories (``AdaIR``, ``MoCE-IR``, ``NAFNet``, ...).
        arguments: of the class, in place of those of the published network.

    Raises:
        ValueError: there is no network of that name.
        FileNotFoundError: the folder has no checkout of it.
        ImportError: a package that it needs is not installed.
    """
    return class_of(name, folder)(**{**_source(name).arguments, **arguments})


def class_of(name: str, folder: str | os.PathLike[str]) -> type[nn.Module]:
    """The class of a published network; arguments and errors as of `create`."""
    if problem := missing(name, folder):
        is_file = (Path(folder) / _source(name).folder / _source(name).file).is_file()
        raise (ImportError if is_file else FileNotFoundError)(f"{name}: {problem}")
    return _load_class(name, Path(folder).resolve())


def _source(name: str) -> Source:
    if name not in SOURCES:
        raise ValueError(f"name: expected one of {', '.join(sorted(SOURCES))}, got {name!r}")
    return SOURCES[name]


@cache
def _load_class(name: str, folder: Path) -> type[nn.Module]:
    source = SOURCES[name]
    checkout = folder / source.folder
    with _substitutes_in_place():
        for needed in source.needs:
            sys.modules[needed] = _run(checkout / f"{needed.replace('.', '/')}.py", needed)
        return getattr(_run(checkout / source.file, ".".join(Path(source.file).with_suffix("").parts)), source.kind)


def _run(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def _substitutes_in_place() -> Iterator[None]:
    """An installed basicsr is replaced, too: each of the repositories has a copy of its own that differs."""
    substitutes = {name: _module(name, content) for name, content in _SUBSTITUTES.items()}
    if is_there("fvcore"):
        substitutes = {name: module for name, module in substitutes.items() if not name.startswith("fvcore")}

    def theirs() -> list[str]:
        return [name for name in sys.modules if name in substitutes or name.startswith("basicsr.")]

    kept = {name: sys.modules.pop(name) for name in theirs()}
    sys.modules.update(substitutes)
    try:
        yield
    finally:
        for name in theirs():
            del sys.modules[name]
        sys.modules.update(kept)


def _module(name: str, content: Mapping[str, Any]) -> ModuleType:
    module = ModuleType(name)
    module.__path__ = []
    vars(module).update(content)
    return module
