"""Sets of test images: which folder layouts are known, and which input belongs to which target.

- ``input/`` and ``target/`` (also ``lq``, ``gt``, ...: `INPUTS`, `TARGETS`), side by side: pairs.
- ``target/`` alone, or images in the folder itself: clean images, to which noise is added.
- a folder of clean images beside several of degraded ones (CDD11: ``clear/``, ``low/``, ``low_haze/``, ...): one set
  each.
- a text file: a path of an image on each line, or an input and its target.

An input's target has its name, or the name that data sets make of it: see `target_of`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mirage.inputs import photographs_in

__all__ = ["INPUTS", "TARGETS", "ImageSet", "Item", "find_sets", "target_of"]

INPUTS = ("input", "inputs", "lq", "LQ", "low", "degraded", "rainy", "rain", "hazy", "haze", "blur", "blurry", "noisy",
          "data", "synthetic", "raw", "raw-890", "raw_890")  # fmt: skip
TARGETS = ("target", "targets", "gt", "GT", "clean", "clear", "sharp", "high", "groundtruth", "ground_truth", "norain",
           "original", "reference", "reference-890", "reference_890", "HQ", "HR")  # fmt: skip
RENAMED = (("rain", "clean"), ("rain", "norain"), ("noisy", "clean"), ("low", "normal"), ("low", "high"),
           ("blur", "sharp"), ("hazy", "clear"), ("hazy", "GT"), ("NOISY", "GT"), ("lq", "gt"))  # fmt: skip
"""What stands in an input's name where its target's has another word."""


@dataclass(frozen=True)
class Item:
    """One test image: ``name`` (its place in the set, without suffix), its ``target``, and its ``input``, or None where
    the input is the target with noise."""

    name: str
    target: Path
    input: Path | None = None


@dataclass(frozen=True)
class ImageSet:
    """Images evaluated together.

    Attributes:
        name: as given on the command line.
        items: in the order of their names.
        clean: there are no inputs; noise is added to the targets.
    """

    name: str
    items: tuple[Item, ...]
    clean: bool
    skipped: tuple[tuple[Path, str], ...] = field(default=(), compare=False)


def find_sets(name: str, place: str | Path, root: str | Path | None = None) -> list[ImageSet]:
    """The sets in a folder or text file; more than one only in the layout of CDD11.

    Args:
        name: of the set; those of CDD11 are called after their folders.
        root: where the paths of a text file begin; its own folder by default.

    Raises:
        ValueError: there is no such place, no image in it, or a line of the file that is none.
    """
    place = Path(place)
    if place.is_file():
        return [_from_list(name, place, Path(root) if root is not None else place.parent)]
    if not place.is_dir():
        raise ValueError(f"set {name}: no such folder or text file: {place}")
    if (place / "test" / "clear").is_dir():  # CDD11 as it is distributed
        place = place / "test"
    folders = {path.name: path for path in sorted(place.iterdir()) if path.is_dir()}
    targets = [folders[each] for each in TARGETS if each in folders]
    inputs = [path for path in folders.values() if path not in targets]
    if len(targets) == 1 and len(inputs) > 1 and not any(path.name in ("input", "inputs") for path in inputs):
        found = [_pairs(path.name, path, targets[0]) for path in inputs]
        found = [each for each in found if each.items]
    elif targets and any(each in folders for each in INPUTS):
        found = [_pairs(name, next(folders[each] for each in INPUTS if each in folders), targets[0])]
    else:
        found = [_clean(name, targets[0] if targets else place)]
    if not any(each.items for each in found):
        raise ValueError(f"set {name}: no images in {place} that could be evaluated")
    return found


def target_of(stem: str, targets: Mapping[str, Path]) -> Path | None:
    """The target of the input called ``stem`` among ``targets``, by stem: the same name; ``no`` before it (Rain100L);
    what stands before an underscore, the last first (SOTS ``0001_0.8_0.2`` -> ``0001``, Outdoor-Rain); another word in
    it (RainDrop ``0_rain`` -> ``0_clean``; UDC, LOL); None where there is none."""
    parts = stem.split("_")
    shorter = ["_".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]
    candidates = [stem, f"no{stem}", *shorter, *(f"no{each}" for each in shorter)]
    candidates += [stem.replace(old, new) for old, new in RENAMED if old in stem]
    return next((targets[each] for each in candidates if each in targets), None)


def _pairs(name: str, inputs: Path, targets: Path) -> ImageSet:
    skipped: list[tuple[Path, str]] = []
    by_folder: dict[str, dict[str, Path]] = {}
    for label, path in _images(targets, skipped).items():
        place, stem = _split(label)
        by_folder.setdefault(place, {})[stem] = path
    items = []
    for label, path in _images(inputs, skipped).items():
        place, stem = _split(label)
        target = target_of(stem, by_folder.get(place, {}))
        if target is None:
            skipped.append((path, f"no target for it in {targets}"))
        else:
            items.append(Item(label, target, path))
    return ImageSet(name, tuple(items), clean=False, skipped=tuple(skipped))


def _clean(name: str, folder: Path) -> ImageSet:
    skipped: list[tuple[Path, str]] = []
    items = tuple(Item(label, path) for label, path in _images(folder, skipped).items())
    return ImageSet(name, items, clean=True, skipped=tuple(skipped))


def _from_list(name: str, file: Path, root: Path) -> ImageSet:
    """A text file's images; a path below a folder called as `INPUTS` are is an input, its target beside that folder."""
    items: list[Item] = []
    skipped: list[tuple[Path, str]] = []
    targets: dict[Path, dict[str, Path]] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        fields = line.replace(",", " ").split()
        if not fields or line.lstrip().startswith("#"):
            continue
        if len(fields) > 2:
            raise ValueError(f"set {name}: line {number} of {file}: expected a path, or input and target, got {line!r}")
        label = Path(fields[0]).with_suffix("").as_posix()
        first, second = root / fields[0], root / fields[-1]
        missing = next((path for path in (first, second) if not path.exists()), None)
        if missing is not None:
            skipped.append((missing, "no such file"))
        elif len(fields) == 2:
            items.append(Item(label, second, first))
        elif (folder := _beside(first, root)) is not None:
            if folder not in targets:
                targets[folder] = {path.stem: path for path in sorted(folder.iterdir())}
            target = target_of(first.stem, targets[folder])
            if target is None:
                skipped.append((first, f"no target for it in {folder}"))
            else:
                items.append(Item(label, target, first))
        else:
            items.append(Item(label, first))
    kinds = {item.input is None for item in items}
    if len(kinds) != 1:
        what = "no images that exist" if not kinds else "inputs with and without targets, which are two sets"
        raise ValueError(f"set {name}: {what} in {file}")
    return ImageSet(name, tuple(items), clean=kinds.pop(), skipped=tuple(skipped))


def _beside(path: Path, root: Path) -> Path | None:
    """The folder of targets beside the folder of inputs, below ``root``, that an input lies in."""
    below = [folder for folder in path.parents if root in folder.parents]
    above = next((folder for folder in below if folder.name in INPUTS), None)
    if above is None:
        return None
    return next((folder for each in TARGETS if (folder := above.parent / each).is_dir()), None)


def _images(folder: Path, skipped: list[tuple[Path, str]]) -> dict[str, Path]:
    """The images below a folder by their places in it without suffix."""
    found: dict[str, Path] = {}
    for path in photographs_in(folder, lambda path, reason: skipped.append((path, reason))):
        label = path.relative_to(folder).with_suffix("").as_posix()
        if label in found:
            skipped.append((path, f"its name is that of {found[label].name}"))
        else:
            found[label] = path
    return found


def _split(name: str) -> tuple[str, str]:
    folder, _, stem = name.rpartition("/")
    return folder, stem
