"""`ExpertStore`: one network, and many experts that differ from it by little: folded where they are needed, within a
budget of memory.
"""

from __future__ import annotations

import copy
import math
import os
import re
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mirage.checkpoint import CheckpointError
from mirage.restore.budget import parse_bytes
from mirage.restore.loading import load_model, prepare_module, resolve_device
from mirage.restore.pixels import MULTIPLE, multiple_of, pad_to_multiple
from mirage.unirestorer.lora import LoRASettings, add_low_rank, has_lora
from mirage.unirestorer.lora_files import (
    LORA_KEY,
    A,
    B,
    check_base,
    convolutions,
    digest_of,
    header_of,
    lora_state,
    problems_of,
)
from mirage.unirestorer.mapped import Weights
from mirage.wording import counted

__all__ = ["ExpertStore"]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


@dataclass(eq=False)
class Expert:
    """What the store knows of an expert.

    Attributes:
        kind: ``"base"``, ``"lora"`` or ``"full"``: it is the base, adds to it, or is a network of its own.
        weights: of ``"lora"`` what is added; of ``"full"`` the file, or None where ``network`` is there at any rate.
        header: of ``"lora"`` what `save_lora` writes beside the tensors.
        fits: ``weights`` were found to be those of the base's convolutions.
    """

    kind: str
    weights: Weights | None = None
    header: Mapping[str, Any] = field(default_factory=dict)
    network: nn.Module | None = None
    fits: bool = False


@dataclass(eq=False)
class _Slot:
    """A network in memory, of one expert at a time.

    Attributes:
        network: what runs.
        tensors: its weights and buffers by name, sharing its memory.
        like_base: it has the base's architecture, so that another expert can take it over.
        users: how many callers run it at the moment.
        bytes: of the tensors.
    """

    network: nn.Module
    tensors: Mapping[str, Tensor]
    like_base: bool = True
    users: int = 0
    bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.bytes = sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


class ExpertStore:
    """A base network and its experts: those that add LoRA to it, and others that are networks of their own.

    An expert is folded (`mirage.unirestorer.fold`) into memory of its own when images need it, and stays there while
    the budget lasts; those that were not used for longest go, and the memory of one goes to the next. What folding
    reads lies in files, of a store that was loaded, and is mapped while it is read.

    Args:
        base: the network, with its own weights and without LoRA; copied.
        memory: bytes, such as ``"2G"``, for the weights of experts in memory; one is there at any rate, and as many as
            run at the same time. None: all stay.
        device: where experts run, as of `mirage.Restorer`; ``"auto"`` is the base's own.
        fast: experts run on `mirage.fast`, as far as that knows their network.

    Raises:
        TypeError: ``base`` is no module.
        ValueError: it has LoRA, or an argument makes no sense.

    Calls from several threads at once are safe, and give what they give one after the other.
    """

    def __init__(
        self,
        base: nn.Module,
        *,
        memory: int | str | None = None,
        device: str | torch.device = "auto",
        fast: bool = True,
    ) -> None:
        if not isinstance(base, nn.Module):
            raise TypeError(f"base: expected a torch.nn.Module, got {type(base).__name__}")
        if has_lora(base):
            raise ValueError("base: expected a network without LoRA; remove_lora takes it away")
        where = None if device == "auto" else resolve_device(device)
        weights = Weights.of({name: value.detach().clone() for name, value in base.state_dict().items()})
        self._set_up(copy.deepcopy(base), weights, where, memory, fast)

    def _set_up(
        self,
        network: nn.Module,
        weights: Weights,
        device: torch.device | None,
        memory: int | str | None,
        fast: bool,
    ) -> None:
        """With a network that belongs to the store, and has these weights."""
        self.memory = None if memory is None else parse_bytes(memory)
        self.fast, self.device = fast, device
        self._experts: dict[str, Expert] = {}
        self._weights = weights
        self._digest: str | None = None
        self._lock = threading.RLock()
        network = prepare_module(network, fast=fast, device=device, dtype=None).requires_grad_(False)
        self._free = [_Slot(network, network.state_dict())]
        self._where = next(iter(self._free[0].tensors.values()), torch.empty(0)).device
        self._slots: OrderedDict[str, _Slot] = OrderedDict()

    def __repr__(self) -> str:
        return f"ExpertStore({counted(len(self), 'expert')}; loaded: {', '.join(self.loaded) or 'none'})"

    def __len__(self) -> int:
        return len(self._experts)

    def __contains__(self, name: object) -> bool:
        return name in self._experts

    @property
    def names(self) -> tuple[str, ...]:
        """The experts, in the order in which they were added."""
        return tuple(list(self._experts))

    def kind(self, name: str) -> str:
        """``"base"``, ``"lora"`` or ``"full"``.

        Raises:
            ValueError: there is no such expert.
        """
        return self._find(name).kind

    def _find(self, name: str) -> Expert:
        if name not in self._experts:
            raise ValueError(f"expert: expected one of {', '.join(self.names) or 'none'}, got {name!r}")
        return self._experts[name]

    # --- experts

    def add(self, name: str, expert: nn.Module | str | os.PathLike[str] | None = None) -> None:
        """Add an expert.

        Args:
            name: letters, digits, ``.``, ``_``, ``+`` and ``-``, and new.
            expert: None for the base itself; a network with LoRA (`add_lora`) on the base's weights, of which what it
                adds is copied; another module, kept and used in evaluation mode as a network of its own, and always in
                memory; a file of `save_lora`; or another file that `mirage.networks.load` reads.

        Raises:
            ValueError: the name is taken or unfit, or the network is folded.
            FileNotFoundError: there is no such file.
            CheckpointError: what it adds does not fit the base, or was trained on another one.
        """
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError(f"name: expected letters, digits and . _ + - (none of these first), got {name!r}")
        found = self._expert_of(expert)
        with self._lock:
            if name in self._experts:
                raise ValueError(f"name: {name!r} is there already")
            if found.kind == "lora":
                self._check(name, found)
            self._experts[name] = found

    def _expert_of(self, expert: Any) -> Expert:
        if expert is None:
            return Expert("base")
        if isinstance(expert, nn.Module):
            if not has_lora(expert):
                network = prepare_module(expert, fast=self.fast, device=self.device, dtype=None)
                return Expert("full", network=network)
            header = header_of(expert)
            return Expert("lora", Weights.of({n: v.clone() for n, v in lora_state(expert).items()}), header)
        weights = Weights.at(expert)
        stored = weights.header(LORA_KEY)
        return Expert("full", weights) if stored is None else Expert("lora", weights, stored)

    def _check(self, name: str, expert: Expert) -> None:
        """Refuse what does not fit the base, before anything is written."""
        if expert.fits or expert.weights is None:
            return
        network = self._model().network
        if self._digest is None:
            with self._weights.opened() as base:
                self._digest = digest_of({conv: base[f"{conv}.weight"] for conv in convolutions(network)})
        check_base(network, expert.header, f"expert {name}", self._digest)
        with expert.weights.opened() as tensors:
            problems = problems_of(network, dict(tensors), _settings_of(expert.header, name))
        if problems:
            raise CheckpointError("\n".join([f"expert {name} does not fit {type(network).__name__}:", *problems]))
        expert.fits = True

    # --- restoring

    @torch.no_grad()
    def restore(self, images: Tensor | Sequence[Tensor], experts: Sequence[str]) -> Any:
        """Restore images, each with its expert. Each expert is folded once at most, and runs once for all its images
        whose padded sizes are equal; the others follow by themselves.

        Args:
            images: ``[N, C, H, W]``, or N images ``[C, H, W]`` of any sizes; floating point. Each is padded once, on
                the right and at the bottom, to a multiple of 8 (or of what its expert needs) by reflection, along a
                side not longer than the pad by repeating the edge, and the result is cropped.
            experts: the name of each image's expert.

        Returns:
            Restored images in the order, shapes, dtype and on the device of ``images``: a tensor, or a list for a
            sequence. They have no gradient.

        Raises:
            TypeError: an image is no tensor of floating-point numbers.
            ValueError: other shapes, other numbers of images and experts, an expert that is not there, or one that
                returned another shape.
            CheckpointError: an expert's file is damaged, or has changed.
        """
        given = list(images)
        names = list(experts)
        if len(given) != len(names):
            raise ValueError(f"experts: expected one for each of {len(given)} images, got {len(names)}")
        if isinstance(images, Tensor) and images.ndim != 4:
            raise ValueError(f"images: expected [N, C, H, W], got {list(images.shape)}")
        for image in given:
            _check_image(image)
        for name in names:
            self._find(name)
        restored: list[Any] = [None] * len(given)
        there = set(self.loaded)
        groups: dict[str, list[int]] = {name: [] for name in sorted(dict.fromkeys(names), key=lambda n: n not in there)}
        for position, name in enumerate(names):
            groups[name].append(position)
        for name, positions in groups.items():
            with self.network(name) as network:
                for position, result in zip(positions, _run(network, [given[i] for i in positions]), strict=True):
                    restored[position] = result
        if not isinstance(images, Tensor):
            return restored
        return torch.stack(restored) if restored else images

    @contextmanager
    def network(self, name: str) -> Iterator[nn.Module]:
        """An expert's network, folded and accelerated, while the block runs: for `mirage.Restorer` and other ways to
        run one. It is not to be changed.

        Raises:
            ValueError: there is no such expert.
            CheckpointError: its file is damaged, or has changed.
        """
        with self._use(self._find(name), name) as network:
            yield network

    @contextmanager
    def _use(self, expert: Expert, name: str) -> Iterator[nn.Module]:
        if expert.network is not None:
            yield expert.network
            return
        with self._lock:
            slot = self._slots.get(name)
            if slot is None:
                slot = self._fetch(expert, name)
            self._slots.move_to_end(name)
            slot.users += 1
        try:
            yield slot.network
        finally:
            with self._lock:
                slot.users -= 1
                self._make_room(0)

    # What an inference-mode caller makes must be writable for others.
    @torch.inference_mode(False)
    def _fetch(self, expert: Expert, name: str) -> _Slot:
        """An expert's weights into memory: that of one which goes, where there is one and the two are alike."""
        if expert.kind == "full":
            assert expert.weights is not None
            network = load_model(expert.weights.checked(), fast=self.fast, device=self._where)
            slot = _Slot(network.requires_grad_(False), network.state_dict(), like_base=False)
            self._make_room(slot.bytes)
        else:
            self._check(name, expert)
            model = self._model()
            if not self._free:
                self._make_room(model.bytes, reuse=True)
            slot = self._free.pop() if self._free else _copy_of(model)
            try:
                self._fill(slot, expert)
            except BaseException:
                self._free.append(slot)  # what it holds now is nobody's
                raise
        self._slots[name] = slot
        return slot

    def _model(self) -> _Slot:
        """A slot with the base's architecture; there always is one."""
        return next(slot for slot in (*self._free, *self._slots.values()) if slot.like_base)

    def _make_room(self, needed: int, reuse: bool = False) -> None:
        """Let go of what was not used for longest, until so many bytes more are within the budget or all that is left
        is being used.

        Args:
            needed: bytes.
            reuse: they are of a slot like the base, so that the first of those that go is kept free for it.
        """
        idle = [name for name, slot in self._slots.items() if slot.users == 0]
        while self.memory is not None and self.loaded_bytes + needed > self.memory:
            if self._free and not reuse and not self._is_last(self._free[-1]):
                self._free.pop()
                continue
            name = next((n for n in idle if (reuse and needed) or not self._is_last(self._slots[n])), None)
            if name is None:
                return
            idle.remove(name)
            slot = self._slots.pop(name)
            if reuse and needed and slot.like_base:
                self._free.append(slot)
                needed = 0

    def _is_last(self, slot: _Slot) -> bool:
        """Whether it is the only one that others can be made like."""
        return slot.like_base and sum(each.like_base for each in (*self._free, *self._slots.values())) == 1

    @torch.no_grad()
    def _fill(self, slot: _Slot, expert: Expert) -> None:
        """Write the base's weights and what the expert adds into a slot's memory."""
        added = expert.weights or Weights.of({})
        scale = _settings_of(expert.header, "expert").scale if expert.kind == "lora" else 0.0
        device = self._where
        with self._weights.opened() as base, added.opened() as delta, torch.autocast(device.type, enabled=False):
            for name, target in slot.tensors.items():
                stem = name.removesuffix(".weight")
                a = delta.get(stem + A)
                if a is None:
                    target.copy_(delta.get(name, base[name]))
                    continue
                weight, b = base[name], delta[stem + B]
                if device.type != "cpu":
                    weight, a, b = weight.to(device), a.to(device), b.to(device)
                add_low_rank(weight, a, b, scale, out=target)

    def base_network(self) -> nn.Module:
        """The base as a network in memory of its own, in evaluation mode, as experts run: to train more of them on."""
        with self._lock, torch.inference_mode(False):
            slot = _copy_of(self._model())
            self._fill(slot, Expert("base"))
        return slot.network

    @property
    def loaded(self) -> tuple[str, ...]:
        """The experts that are in memory, the one used last at the end."""
        with self._lock:
            return tuple(self._slots)

    @property
    def loaded_bytes(self) -> int:
        """Bytes of the weights in memory that the budget is for."""
        with self._lock:
            return sum(slot.bytes for slot in (*self._free, *self._slots.values()))

    # --- on disk

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a folder that `load` reads: the base, what each expert adds or is, and ``experts.json``, last.

        Files bear a digest of what they hold, and those of an earlier store in the folder stay until ``experts.json``
        names them no longer, so that the folder holds one store or the other, whole, at any time.

        Raises:
            ValueError: the base, or an expert that is a network of its own, is none that `mirage.networks.load` reads.
            OSError: it cannot be written.
        """
        from mirage.unirestorer.store_files import save_store

        with self._lock:
            save_store(self, Path(folder))

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        memory: int | str | None = None,
        device: str | torch.device = "auto",
        fast: bool = True,
    ) -> ExpertStore:
        """What `save` has written. Experts are read when images need them, from the folder, which has to stay as it is.

        Args:
            folder: the folder.
            memory, device, fast: as of the class; ``"auto"`` is the GPU where there is one.

        Raises:
            FileNotFoundError: there is no such folder, or a file of it is missing.
            ValueError: it holds something else.
            CheckpointError: the base's file is damaged.
        """
        from mirage.unirestorer.store_files import read_store

        found = read_store(Path(folder))
        store = cls.__new__(cls)
        where = resolve_device(device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that shapes alone say which network it is
            network = load_model(found.base, fast=False)
        store._set_up(network, Weights.at(found.base), where, memory, fast)
        store._experts.update(found.experts)
        return store


def _settings_of(header: Mapping[str, Any], name: str) -> LoRASettings:
    try:
        return LoRASettings(header["rank"], header["alpha"], bool(header.get("norms", True)))
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"expert {name}: expected rank and alpha with it, got {dict(header)}") from error


def _copy_of(slot: _Slot) -> _Slot:
    network = copy.deepcopy(slot.network)
    return _Slot(network, network.state_dict())


def _check_image(image: object) -> None:
    if not isinstance(image, Tensor) or not image.is_floating_point():
        got = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(f"images: expected tensors of floating-point numbers, got {got}")
    if image.ndim != 3 or not image.numel():
        raise ValueError(f"images: expected [C, H, W] each, not empty, got {list(image.shape)}")


def _run(network: nn.Module, images: list[Tensor]) -> list[Tensor]:
    """The network on images of any sizes, as many at once as have the same size once they are padded."""
    first: Tensor = next(iter(network.parameters()), images[0])
    multiple = math.lcm(MULTIPLE, multiple_of(network))
    batches: dict[tuple[int, ...], list[int]] = {}
    padded = [pad_to_multiple(image[None].to(first.device, first.dtype), multiple) for image in images]
    for position, x in enumerate(padded):
        batches.setdefault(tuple(x.shape), []).append(position)
    restored: dict[int, Tensor] = {}
    for positions in batches.values():
        x = torch.cat([padded[i] for i in positions])
        y = network(x)
        if not isinstance(y, Tensor) or y.shape != x.shape:
            got = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(f"expert: expected images of shape {list(x.shape)} of its network, got {got}")
        for i, result in zip(positions, y, strict=True):
            height, width = images[i].shape[1:]
            restored[i] = result[:, :height, :width].to(images[i].device, images[i].dtype)
    return [restored[i] for i in range(len(images))]
