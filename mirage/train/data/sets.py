"""From a set of a configuration to pairs of pictures: which files belong together."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from mirage.degradations import Degradation, create_from
from mirage.train.config import ConfigError, PictureSet
from mirage.train.data.pictures import Picture, files_in, shard_samples

__all__ = ["PAIRS", "Pair", "find_pairs"]

PAIRS = {
    "derain": r"rain-(\w+\.\w+)$ => norain-\1",  # Rain100L: rain-12.png, norain-12.png
    "dehaze": r"^(?:.*/)?([^/_]+)[^/]*(\.\w+)$ => \1\2",  # RESIDE: part1/0025_0.8_0.04.jpg, 0025.jpg
}


@dataclass(frozen=True)
class Pair:
    """One picture to learn from.

    Attributes:
        clean: what the network should give.
        degraded: what it sees; None: the clean picture, degraded for each sample.
        rain: whether streaks of rain are added.
        sigma: bounds of the noise's standard deviation, of 255; None: no noise.
        noise: what becomes of the noisy sample: ``"float"``: nothing; ``"rounded"`` and ``"truncated"``: it is clipped,
            and rounded or truncated to 8 bits, the latter as in the released code.
        set: name of the set.
        degradation: what is done to the clean picture in the place of rain and noise, or None.
        scale: how many times smaller the network sees it than the clean picture is.
    """

    clean: Picture
    degraded: Picture | None
    rain: bool
    sigma: tuple[float, float] | None
    noise: Literal["float", "rounded", "truncated"]
    set: str
    degradation: Degradation | None = None
    scale: int = 1

    @property
    def name(self) -> str:
        return (self.degraded or self.clean).name


def find_pairs(one: PictureSet, root: str | os.PathLike[str] = ".") -> list[Pair]:
    """The pairs of a set, each once, in an order that depends on the names alone.

    Raises:
        FileNotFoundError: a folder, list or shard is not there, or names files that are not.
        ConfigError: the rule that leads from degraded to clean names is none, or a shard's sample has no clean picture.
    """
    root = Path(root)
    sigma = None
    if one.sigma is not None:
        bounds = one.sigma if isinstance(one.sigma, list) else [one.sigma]
        sigma = (float(bounds[0]), float(bounds[-1]))
    source = one.shards or one.degraded or one.clean or ""
    name = one.name or Path(source).name
    degradation = None if one.kind is None else create_from(one.kind)
    common = Pair(Picture("", ""), None, one.rain, sigma, one.noise, name, degradation, one.scale)
    if one.shards is not None:
        pattern = one.shards if "://" in one.shards else str(root / one.shards)
        return [_of_shard(key, files, common) for key, files in shard_samples(pattern)]
    clean = root / (one.clean or "")
    if one.degraded is None:
        return [replace(common, clean=_picture(file)) for file in _listed(clean, one, root)]
    degraded = root / one.degraded
    partner = _partners(one, clean)
    files = _listed(degraded, one, root)
    pairs = [(file, partner(file.relative_to(degraded).as_posix())) for file in files]
    missing = [(file, other) for file, other in pairs if other is None or not other.is_file()]
    if missing:
        file, other = missing[0]
        raise FileNotFoundError(
            f"{len(missing)} of {len(pairs)} pictures in {str(degraded)!r} have no clean one by the rule {one.pair!r}; "
            f"the first: {str(file)!r} (looked for {str(other) if other else f'its name in {str(clean)!r}'})"
        )
    return [replace(common, clean=_picture(other), degraded=_picture(file)) for file, other in pairs if other]


def _picture(file: Path) -> Picture:
    return Picture(str(file), str(file))


def _listed(folder: Path, one: PictureSet, root: Path) -> list[Path]:
    """The files of a folder, or those of its list in the list's order.

    A name in the list may begin with the folder's own, as in the released code's lists (``rainy/rain-1.png``).
    """
    if one.names is None:
        return files_in(folder)
    lines = (root / one.names).read_text(encoding="utf-8").splitlines()
    files = [folder / line.strip().removeprefix(f"{folder.name}/") for line in lines if line.strip()]
    missing = [file for file in files if not file.is_file()]
    if missing or not files:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(files)} files that {str(root / one.names)!r} lists are not in "
            f"{str(folder)!r}{f', such as {str(missing[0])!r}' if missing else ''}"
        )
    return files


def _partners(one: PictureSet, clean: Path):
    """The function from a degraded picture's name, relative to its folder, to the clean file or None."""
    if one.pair == "same":
        names = {file.relative_to(clean).with_suffix("").as_posix(): file for file in files_in(clean)}
        return lambda name: names.get(Path(name).with_suffix("").as_posix())
    pattern, arrow, replacement = PAIRS.get(one.pair, one.pair).partition(" => ")
    try:
        expression = re.compile(pattern)
        if not arrow:
            raise re.error("no ' => ' in it")
        expression.sub(replacement, "")
    except re.error as error:
        raise ConfigError(
            f"pair: expected same, {', '.join(PAIRS)} or 'PATTERN => REPLACEMENT', got {one.pair!r}: {error}"
        ) from error
    return lambda name: clean / expression.sub(replacement, name) if expression.search(name) else None


def _of_shard(key: str, files: dict[str, Picture], common: Pair) -> Pair:
    """Clean and degraded are told apart by extensions, ``clean.png`` and ``degraded.png``; or there is one picture."""
    clean = [picture for extension, picture in files.items() if extension.startswith("clean.")]
    degraded = [picture for extension, picture in files.items() if extension.startswith("degraded.")]
    synthetic = common.sigma is not None or common.rain or common.degradation is not None or common.scale > 1
    if len(files) == 1 and synthetic and not degraded:
        return replace(common, clean=next(iter(files.values())))
    if len(clean) == len(degraded) == 1 and common.scale == 1:
        return replace(common, clean=clean[0], degraded=degraded[0])
    expected = "one picture, or " if synthetic else ""
    raise ConfigError(
        f"{next(iter(files.values())).path}: sample {key!r}: expected {expected}clean.EXT and degraded.EXT, "
        f"got {', '.join(sorted(files))}"
    )
