"""`GroupedRestorer`: a network for each group of degradations, and for each image the network of the nearest group."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import nn

from mirage.grids.features import Descriptor
from mirage.grids.ggd import COMPONENTS, GGD, mean_ggd
from mirage.grids.groups import check_names, group_name
from mirage.grids.selection import CROPS, FOREIGN, PATCH, query_ggd, select
from mirage.restore.budget import parse_bytes, release_memory
from mirage.restore.pixels import as_image, colours_of, scale_of
from mirage.whole_files import safetensors_bytes, write_whole

if TYPE_CHECKING:
    from mirage.grids.grouped_files import GroupedOutcome

__all__ = ["Choice", "GroupedRestorer", "Restored", "RestorerGroup"]

FORMAT = "mirage grouped restorer, version 1"
MANIFEST = "groups.json"
DESCRIPTOR = "descriptor.safetensors"


@dataclass(frozen=True)
class RestorerGroup:
    """A group of degradations, and the network that restores them.

    Args:
        ggds: parameters of each member's features, by its name; in the order in which the group is called.
        weights: what `mirage.Restorer` takes: a file, a name of packaged weights, a module; or a restorer itself,
            which maps an image to the restored one.
        psnr: what the network reaches on each member, in dB, where that was measured.

    Raises:
        ValueError: there are no members, or ``psnr`` is of others.
    """

    ggds: Mapping[str, GGD]
    weights: Any = field(repr=False)
    psnr: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.ggds:
            raise ValueError("ggds: expected at least one degradation, got none")
        check_names(self.psnr, list(self.ggds), "psnr")

    @property
    def degradations(self) -> tuple[str, ...]:
        """The members' names."""
        return tuple(self.ggds)

    @property
    def name(self) -> str:
        """Such as ``"GB+MB+RL"``."""
        return group_name(self.ggds, self.degradations)

    @property
    def ggd(self) -> GGD:
        """The group's parameters: plain means of its members'."""
        return mean_ggd(self.ggds.values())


@dataclass(frozen=True)
class Choice:
    """The group of an image.

    Attributes:
        group: its name, such as ``"GB+MB+RL"``.
        kl: KL(group || image) in nats.
        distance: S(group, image), the same on the logarithmic scale. A small one forecasts a good result.
        foreign: the distance passes the limit: no group was trained on what this image has.
        distances: S of every group, by its name.
    """

    group: str
    kl: float
    distance: float
    foreign: bool
    distances: Mapping[str, float]


class Restored(NamedTuple):
    """A restored image, and the group whose network did it."""

    image: np.ndarray
    choice: Choice


class GroupedRestorer:
    """Restores each image with the network of the group of degradations that it lies nearest to.

    Args:
        groups: degradations and networks; a degradation is in one of them.
        descriptor: what the groups' GGDs were fitted to features of.
        crops, components, patch: of an image, as of the patches that the groups' GGDs come from.
        seed: of the places of crops.
        foreign: distance above which an image is called foreign.
        memory: bytes, such as ``"2G"``, for the weights of loaded networks: a network is loaded when an image needs it,
            and those that were not used for longest go. One is there at any rate. None: all stay.
        options: arguments of `mirage.Restorer`, such as ``device``, ``tile``, or ``memory`` as ``image_memory``.

    Raises:
        ValueError: there are no groups, a degradation is in two, or an argument makes no sense.

    Calls from several threads at once are safe.
    """

    def __init__(
        self,
        groups: Iterable[RestorerGroup],
        descriptor: Descriptor,
        *,
        crops: int = CROPS,
        components: int = COMPONENTS,
        patch: int = PATCH,
        seed: int = 0,
        foreign: float = FOREIGN,
        memory: int | str | None = None,
        **options: Any,
    ) -> None:
        self.groups = {group.name: group for group in groups}
        _check(list(self.groups.values()))
        self.descriptor = descriptor
        self.crops, self.components, self.patch, self.seed, self.foreign = crops, components, patch, seed, foreign
        self.memory = None if memory is None else parse_bytes(memory)
        if "image_memory" in options:
            options["memory"] = options.pop("image_memory")
        self.options = options
        self._loaded: OrderedDict[str, tuple[Any, int]] = OrderedDict()
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        return f"GroupedRestorer({', '.join(self.groups)}; loaded: {', '.join(self.loaded) or 'none'})"

    # --- choosing

    def select(self, image: np.ndarray) -> Choice:
        """The group of an image. No restorer runs, and none is loaded.

        Args:
            image: as `mirage.Restorer` takes it; alpha does not count, grey is RGB of equal channels.

        Raises:
            TypeError, ValueError: the image is none, or has the same colour everywhere.
        """
        crops = {"crops": self.crops, "components": self.components, "patch": self.patch, "seed": self.seed}
        query = query_ggd(_rgb(image), self.descriptor, **crops)
        names = list(self.groups)
        found = select([self.groups[name].ggd for name in names], query, foreign=self.foreign)
        distances = dict(zip(names, found.distances, strict=True))
        return Choice(names[found.group], found.divergence, found.distance, found.foreign, distances)

    def distance(self, image: np.ndarray) -> float:
        """How far an image lies from the nearest group: a forecast of the quality, and above ``foreign`` a warning."""
        return self.select(image).distance

    # --- restoring

    def restore(self, image: np.ndarray, choice: Choice | None = None) -> Restored:
        """Restore an image with its group's network.

        Args:
            image: as `mirage.Restorer` takes it.
            choice: from `select`, where that is known.

        Raises:
            TypeError, ValueError: as `select` and `mirage.Restorer`.
        """
        choice = self.select(image) if choice is None else choice
        return Restored(self.restorer(choice.group)(image), choice)

    def restorer(self, group: str) -> Callable[[np.ndarray], np.ndarray]:
        """The restorer of a group, loaded where it is not there.

        Raises:
            ValueError: there is no such group, or its weights cannot be read.
        """
        check_names([group], self.groups, "group")
        with self._lock:
            if group in self._loaded:
                self._loaded.move_to_end(group)
            else:
                found = self._load(self.groups[group].weights)
                self._loaded[group] = (found, _weight_bytes(found))
                self._make_room()
            return self._loaded[group][0]

    def _load(self, weights: Any) -> Any:
        import mirage

        if callable(weights) and not isinstance(weights, nn.Module):
            return weights
        return mirage.Restorer(weights, **self.options)

    def _make_room(self) -> None:
        """Let go of what was not used for longest, until the rest is within the budget."""
        gone = False
        while self.memory is not None and len(self._loaded) > 1 and self.loaded_bytes > self.memory:
            self._loaded.popitem(last=False)
            gone = True
        if gone:
            release_memory()

    @property
    def loaded(self) -> tuple[str, ...]:
        """The groups whose networks are loaded, the one used last at the end."""
        return tuple(self._loaded)

    @property
    def loaded_bytes(self) -> int:
        """Bytes of the weights that are loaded."""
        return sum(size for _, size in self._loaded.values())

    def files(
        self,
        inputs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        out_dir: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        on_skip: Callable[[Path, str], None] | None = None,
        **options: Any,
    ) -> Iterator[GroupedOutcome]:
        """Restore files, and all images of folders, into a folder; ``groups.jsonl`` and ``groups.csv`` there tell
        each file's group, distance, and whether it is foreign. Needs the extra ``images``.

        A run that was stopped goes on where it was, as of `mirage.Restorer.files`; a folder with results of other
        groups is refused.

        Args:
            inputs, out_dir, on_skip: as there.
            overwrite: restore again what is finished, also where it is of other groups.
            options: ``format``, ``quality``, ``max_pixels``, as there.

        Yields:
            A `mirage.grids.GroupedOutcome` for each file as it is done.

        Raises:
            ValueError: the folder has results of other groups.
        """
        from mirage.grids.grouped_files import restore_grouped

        given = [inputs] if isinstance(inputs, (str, os.PathLike)) else list(inputs)
        return restore_grouped(self, map(Path, given), Path(out_dir), overwrite, on_skip, options)

    # --- on disk

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digest of what decides which group an image belongs to, and which network that is."""
        digest = hashlib.sha256(json.dumps(self._choosing(), sort_keys=True).encode())
        for group in self.groups.values():
            digest.update(_digest_of(group.weights))
        return digest.hexdigest()

    def _choosing(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("crops", "components", "patch", "seed", "foreign")}
        groups = [
            {
                "degradations": {name: [each.alpha, each.sigma] for name, each in group.ggds.items()},
                "psnr": dict(group.psnr),
            }
            for group in self.groups.values()
        ]
        return {**own, "descriptor": getattr(self.descriptor, "fingerprint", None), "groups": groups}

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a folder that `load` reads: the networks' files, the descriptor's, and ``groups.json``, last.

        A descriptor that is no `mirage.grids.SRResNetDescriptor` is not written: `load` has to be given it.

        Raises:
            ValueError: a group has a restorer of its own in the place of weights, which no file can hold.
            OSError: it cannot be written.
        """
        from mirage.grids.descriptor import SRResNetDescriptor

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        content = {"format": FORMAT, **self._choosing()}
        for entry, group in zip(content["groups"], self.groups.values(), strict=True):
            entry["weights"] = _save_weights(group, folder)
        if isinstance(self.descriptor, SRResNetDescriptor):
            state = {name: value.contiguous() for name, value in self.descriptor.network.state_dict().items()}
            write_whole(folder / DESCRIPTOR, safetensors_bytes(state, {"format": "pt"}))
            content["descriptor_weights"] = DESCRIPTOR
            content["activation"] = self.descriptor.activation
        write_whole(folder / MANIFEST, (json.dumps(content, indent=1) + "\n").encode("utf-8"))

    @classmethod
    def load(
        cls, folder: str | os.PathLike[str], descriptor: Descriptor | None = None, **options: Any
    ) -> GroupedRestorer:
        """What `save` has written. Networks are read when images need them.

        Args:
            folder: the folder.
            descriptor: in the place of the folder's, with the same weights.
            options: further arguments of the class: ``memory``, ``foreign``, ``device``, ...

        Raises:
            FileNotFoundError: there is no such folder, or a file of it is missing.
            ValueError: it holds something else, or the descriptor is another one.
        """
        folder = Path(folder)
        path = folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(f"no groups of restorers in {str(folder)!r}: it has no {MANIFEST}")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict) or content.get("format") != FORMAT:
                raise ValueError(f"expected the format {FORMAT!r}")
            groups = [_group_of(entry, folder) for entry in content["groups"]]
            own = {name: content[name] for name in ("crops", "components", "patch", "seed", "foreign")}
            wanted = content["descriptor"]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: not readable as groups of restorers: {error}") from error
        missing = [group.weights for group in groups if not group.weights.is_file()]
        if missing:
            raise FileNotFoundError(f"{path}: names {missing[0].name}, which is not there")
        if descriptor is None:
            descriptor = _descriptor_of(content, folder, options.get("device", "auto"))
        found = getattr(descriptor, "fingerprint", None)
        if wanted is not None and found is not None and found != wanted:
            raise ValueError(f"{path}: the descriptor has other weights than the one that the groups were measured by")
        return cls(groups, descriptor, **{**own, **options})


def _check(groups: Sequence[RestorerGroup]) -> None:
    if not groups:
        raise ValueError("groups: expected at least one, got none")
    members = [name for group in groups for name in group.degradations]
    twice = sorted({name for name in members if members.count(name) > 1})
    if twice:
        raise ValueError(f"groups: expected each degradation in one group, got {', '.join(twice)} in several")


def _rgb(image: np.ndarray) -> np.ndarray:
    """``[H, W, 3]``, float32 in [0, 1], without alpha."""
    pixels = as_image(image)
    colours = pixels[..., : colours_of(pixels)].astype(np.float32) / np.float32(scale_of(pixels.dtype))
    return np.repeat(colours, 3, axis=2) if colours.shape[2] == 1 else colours


def _weight_bytes(restorer: Any) -> int:
    model = getattr(restorer, "model", None)
    if not isinstance(model, nn.Module):
        return 0
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _digest_of(weights: Any) -> bytes:
    """Of a file its content; of a module its tensors; of anything else what it calls itself."""
    import torch

    from mirage.restore.loading import resolve_weights

    if isinstance(weights, nn.Module):
        digest = hashlib.sha256()
        for name, value in sorted(weights.state_dict().items()):
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.digest()
    if isinstance(weights, (str, os.PathLike)):
        with open(resolve_weights(weights), "rb") as file:
            digest = hashlib.sha256()
            while part := file.read(1 << 20):
                digest.update(part)
        return digest.digest()
    return repr(type(weights)).encode()


def _save_weights(group: RestorerGroup, folder: Path) -> str:
    """Write a group's weights into a folder; returns the file's name."""
    import mirage
    from mirage.restore.loading import resolve_weights

    weights = group.weights
    if isinstance(weights, nn.Module):
        name = f"{group.name}.safetensors"
        mirage.save_checkpoint(weights, folder / name)
        return name
    if not isinstance(weights, (str, os.PathLike)):
        raise ValueError(f"groups: {group.name} has a restorer in the place of weights, which cannot be saved")
    source = resolve_weights(weights)
    name = group.name + source.suffix
    if not (folder / name).exists() or not (folder / name).samefile(source):
        partial = folder / f".{name}.part"
        shutil.copyfile(source, partial)
        os.replace(partial, folder / name)
    return name


def _group_of(entry: Mapping[str, Any], folder: Path) -> RestorerGroup:
    name = Path(entry["weights"])
    if name.name != str(name):
        raise ValueError(f"weights: expected the name of a file in the folder, got {str(name)!r}")
    ggds = {each: GGD(float(alpha), float(sigma)) for each, (alpha, sigma) in entry["degradations"].items()}
    return RestorerGroup(ggds, folder / name, {each: float(value) for each, value in entry["psnr"].items()})


def _descriptor_of(content: Mapping[str, Any], folder: Path, device: Any) -> Descriptor:
    from mirage.grids.descriptor import SRResNetDescriptor
    from mirage.restore.loading import resolve_device

    name = content.get("descriptor_weights")
    if name is None:
        raise ValueError(f"{folder / MANIFEST}: was saved without its descriptor, which has to be given")
    path = folder / Path(name).name
    return SRResNetDescriptor.from_weights(path, device=resolve_device(device), activation=content["activation"])
