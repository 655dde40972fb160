"""Configurations of training: YAML files and ``key=value`` overrides, checked key by key.

A configuration is a tree of the dataclasses below, `Config` at its root; each field's comment says what it means. What
a file leaves out keeps its default. An unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

__all__ = ["Config", "ConfigError", "PictureSet", "as_dict", "load_config", "packaged", "parse_overrides"]


class ConfigError(ValueError):
    """A configuration with an unknown key, a value of another type, or values that do not go together."""


# --8<-- [start:keys]
@dataclass
class Model:
    network: str = "mirage"  # or a name of mirage.networks: restormer, promptir, nafnet, srresnet
    size: Literal["tiny", "small"] = "tiny"  # of MIRAGE, as are drop_path, spd and ablation
    arguments: dict[str, Any] = field(default_factory=dict)  # further arguments of the network, such as dim or heads
    drop_path: float = 0.1  # stochastic depth of the gated CNN branches
    spd: bool = True  # the SPD head; without it there is no contrastive term
    ablation: str | None = None  # a row of Tables 7 and C, see `mirage train ablations`
    fast: bool = True  # mirage.fast's modules, or the reference in plain PyTorch
    memory: Literal["low", "fast"] = "fast"  # what fast blocks keep from forward to backward
    weights: str | None = None  # a checkpoint whose weights training starts from
    key: str | None = None  # which network, where it holds several: params, state_dict_ema, ...


@dataclass
class Loss:
    preset: Literal["paper", "released"] = "paper"  # of mirage.losses.MirageLoss
    fourier_weight: float | None = None  # in the place of the preset's
    contrastive_weight: float | None = None
    temperature: float | None = None


@dataclass
class Optimizer:
    name: Literal["adam", "adamw"] = "adamw"
    lr: float = 2e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float | None = None  # PyTorch's default: 0 of Adam, 0.01 of AdamW
    clip: float | None = None  # norm that gradients are clipped to


@dataclass
class Schedule:
    kind: Literal["cosine", "wsd"] = "cosine"  # wsd: warm-up, constant, decay
    steps: int | None = None  # optimizer steps in all, or ...
    epochs: float | None = None  # ... passes over the data
    warmup: int = 0  # steps over which the rate rises linearly, or ...
    warmup_epochs: float | None = None  # ... epochs
    horizon_epochs: float | None = None  # where cosine ends, if not with the training
    by_epoch: bool = False  # the rate changes between epochs only, and the first two have that of the first
    final_lr: float = 0.0  # where cosine and decay end
    decay_from: int | None = None  # wsd: the step at which the decay begins; without it the rate stays


@dataclass
class PictureSet:
    name: str = ""  # in logs
    clean: str | None = None  # folder of clean pictures
    degraded: str | None = None  # folder of degraded ones; without it clean ones get rain, noise or kind
    names: str | None = None  # text file with a name a line, relative to the folder: these files alone
    pair: str = "same"  # from a degraded name to the clean one: same, derain, dehaze, or "PATTERN => REPLACEMENT"
    shards: str | None = None  # WebDataset shards in the place of folders, such as "train-{000..031}.tar"
    sigma: Any = None  # of the noise, of 255: a number, or a range [low, high] drawn from for each sample
    rain: bool = False  # streaks of rain, drawn for each sample, before the noise
    kind: Any = None  # of mirage.degradations, drawn for each sample: a name, {kind: GB, sigma: [2, 4]}, all, or a list
    # As it is; clipped and rounded to 8 bits, as in photographs; or clipped and truncated, as in the released code.
    noise: Literal["float", "rounded", "truncated"] = "float"
    scale: int = 1  # super-resolution: the network sees pictures so many times smaller, by bicubic interpolation
    repeat: int = 1  # how often an epoch passes over the set


@dataclass
class Data:
    root: str = "."  # what relative folders, lists and shards are relative to
    sets: list[PictureSet] = field(default_factory=list)
    validation: list[PictureSet] = field(default_factory=list)
    crop: int = 128
    augment: Literal["all", "flips", "released", "none"] = "all"  # eight; four; seven (never none at all); none
    batch: int = 32  # samples of one optimizer step, over all devices and accumulated passes
    workers: int = 0  # processes that prepare samples, for each device
    cache: float = 1.0  # GiB of decoded pictures that are kept, for each device
    hold_out: int = 0  # pictures of each set that are kept for validation
    validation_crop: int = 128  # side of the centre crop of validation pictures


@dataclass
class Trainer:
    accelerator: str = "auto"  # this and the next four are arguments of Lightning's Fabric
    devices: Any = 1
    nodes: int = 1
    strategy: str = "auto"
    precision: str = "32-true"
    accumulate: int = 1  # passes of one optimizer step
    threads: int | None = None  # of PyTorch on the CPU
    ema: float | None = None  # decay of the averaged weights
    sync_batchnorm: bool = False  # statistics over all GPUs; needs model.fast=false
    on_nan: Literal["stop", "skip"] = "stop"  # where a loss or gradient is not finite
    resume: str | None = None  # a checkpoint to go on from; default: the newest in output.folder


@dataclass
class Output:
    folder: str = "runs/mirage"
    checkpoint_minutes: float | None = 5.0  # a checkpoint after so many minutes ...
    checkpoint_steps: int | None = None  # ... or steps
    keep: int = 2  # checkpoints that stay
    log_steps: int = 50
    validate_steps: int = 1000
    tensorboard: bool = False


@dataclass
class Config:
    seed: int = 0
    model: Model = field(default_factory=Model)
    loss: Loss = field(default_factory=Loss)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    data: Data = field(default_factory=Data)
    trainer: Trainer = field(default_factory=Trainer)
    output: Output = field(default_factory=Output)


# --8<-- [end:keys]


def packaged() -> dict[str, Path]:
    """The configurations inside the package, by name."""
    folder = Path(__file__).with_name("configs")
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a YAML file, with overrides such as ``"optimizer.lr=1e-3"``.

    Args:
        path: of the file, or the name of one inside the package, such as ``3deg-tiny``. A key ``include`` at its top
            lists files, relative to it, whose values it changes.
        overrides: ``key=value``; values are YAML. A set is changed by its number: ``data.sets.0.clean``.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: it is no YAML mapping, or a key or value is wrong; the message names it.
    """
    tree = _merge(_read(_find(path)), parse_overrides(overrides))
    config = _build(Config, tree, "")
    _check(config)
    return config


def _find(path: str | Path) -> Path:
    if Path(path).is_file():
        return Path(path)
    known = packaged()
    if str(path) in known:
        return known[str(path)]
    near = difflib.get_close_matches(str(path), known, 1)
    hint = f"; the nearest packaged configuration is {near[0]!r}" if near else ""
    raise FileNotFoundError(f"no configuration at {str(path)!r}{hint}. Packaged: {', '.join(known)}")


def _read(path: Path, inside: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The tree in a file, over those that it includes."""
    import yaml

    if path in inside:
        raise ConfigError(f"{path}: includes itself")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values, got {type(content).__name__}")
    tree: dict[str, Any] = {}
    included = content.pop("include", [])
    for name in [included] if isinstance(included, str) else included:
        other = path.parent / name
        if not other.is_file():
            raise ConfigError(f"{path}: include: no file at {str(other)!r}")
        tree = _merge(tree, _read(other, (*inside, path)))
    return _merge(tree, content)


def _check(config: Config) -> None:
    """Refuse values that do not go together."""
    s, d, t = config.schedule, config.data, config.trainer
    _check_model(config.model)
    if (s.steps is None) == (s.epochs is None):
        raise ConfigError(f"schedule: expected steps or epochs, got steps={s.steps}, epochs={s.epochs}")
    if s.decay_from is not None and s.kind != "wsd":
        raise ConfigError(f"schedule.decay_from belongs to schedule.kind=wsd, got {s.kind}")
    if not d.sets:
        raise ConfigError("data.sets: expected at least one set of pictures")
    if len(config.optimizer.betas) != 2:
        raise ConfigError(f"optimizer.betas: expected two numbers, got {config.optimizer.betas}")
    if t.ema is not None and not 0 < t.ema < 1:
        raise ConfigError(f"trainer.ema: expected a number between 0 and 1, got {t.ema}")
    if t.strategy != "auto" and not t.strategy.startswith("ddp"):
        raise ConfigError(
            f"trainer.strategy: expected auto, ddp or one of its kinds (ddp_spawn, ...), got {t.strategy!r}: a network "
            "of 10 million weights gains nothing from sharding them, and checkpoints hold them whole"
        )
    for name, value in (("data.crop", d.crop), ("data.validation_crop", d.validation_crop)):
        if value <= 0 or value % 8:
            raise ConfigError(f"{name}: expected a positive multiple of 8, got {value}")
    if config.output.keep < 1:
        raise ConfigError(f"output.keep: expected at least 1, got {config.output.keep}")
    for group, pictures in (("sets", d.sets), ("validation", d.validation)):
        for i, one in enumerate(pictures):
            _check_set(one, f"data.{group}[{i}]")
    _check_scales([*d.sets, *d.validation], d)


def _check_scales(sets: Sequence[PictureSet], data: Data) -> None:
    """One network has one scale, and a crop has to be made so many times smaller."""
    scales = sorted({one.scale for one in sets})
    if len(scales) > 1:
        raise ConfigError(f"data: expected one scale of all sets, got {', '.join(map(str, scales))}")
    for name, value in (("data.crop", data.crop), ("data.validation_crop", data.validation_crop)):
        if value % scales[0]:
            raise ConfigError(f"{name}: expected a multiple of the sets' scale {scales[0]}, got {value}")


def _check_model(model: Model) -> None:
    if model.network == "mirage":
        return
    from mirage.networks import names

    if model.network not in names():
        known = ["mirage", *names()]
        near = difflib.get_close_matches(model.network, known, 1, cutoff=0)[0]
        raise ConfigError(
            f"model.network: expected one of {', '.join(known)}, got {model.network!r}; the nearest is {near!r}"
        )
    if model.ablation is not None:
        raise ConfigError(f"model.ablation: is of MIRAGE alone, got model.network={model.network}")


def _check_set(one: PictureSet, place: str) -> None:
    if (one.clean is None) == (one.shards is None):
        raise ConfigError(f"{place}: expected a folder (clean) or shards, got clean={one.clean}, shards={one.shards}")
    if one.repeat < 1:
        raise ConfigError(f"{place}.repeat: expected at least 1, got {one.repeat}")
    if one.scale < 1:
        raise ConfigError(f"{place}.scale: expected at least 1, got {one.scale}")
    if one.scale > 1 and one.degraded is not None:
        raise ConfigError(f"{place}: expected degraded (a folder) or scale={one.scale}, which makes them, got both")
    sigma = one.sigma if isinstance(one.sigma, list) else [one.sigma]
    number = all(isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0 for value in sigma)
    if one.sigma is not None and not (number and 1 <= len(sigma) <= 2 and sigma == sorted(sigma)):
        raise ConfigError(f"{place}.sigma: expected a number or a range [low, high], got {one.sigma!r}")
    if one.kind is not None:
        _check_kind(one, place)
    elif one.sigma is None and not one.rain and one.scale == 1 and one.degraded is None and one.shards is None:
        raise ConfigError(f"{place}: expected degraded (a folder), sigma (noise) or rain=true, a kind or a scale")


def _check_kind(one: PictureSet, place: str) -> None:
    from mirage.degradations import create_from

    others = {"degraded": one.degraded, "sigma": one.sigma, "rain": one.rain or None}
    beside = [name for name, value in others.items() if value is not None]
    if beside or one.noise != "float":
        raise ConfigError(f"{place}.kind: goes with clean pictures alone, got {(*beside, 'noise')[0]} beside it")
    try:
        create_from(one.kind)
    except ValueError as error:
        raise ConfigError(f"{place}.{error}") from error


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """``["optimizer.lr=1e-3", ...]`` as a tree; values are read as YAML.

    Raises:
        ConfigError: one has no ``=``, or its value is no YAML.
    """
    import yaml

    tree: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"expected key=value, got {override!r}")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{key}: not readable as YAML: {text!r}") from error
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        tree = _merge(tree, nested)
    return tree


def as_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain mappings, lists, text and numbers."""
    return dataclasses.asdict(config)


def changes(old: Mapping[str, Any], new: Mapping[str, Any], place: str = "") -> list[str]:
    """Where two configurations differ, as lines ``optimizer.lr: 0.001 -> 0.0005``; keys that one lacks do not count."""
    lines = []
    for key in (key for key in old if key in new and old[key] != new[key]):
        before, after, name = old[key], new[key], f"{place}{key}"
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += changes(before, after, f"{name}.")
        else:
            lines.append(f"{name}: {before} -> {after}")
    return lines


def _merge(base: dict[str, Any], changes: Mapping[Any, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, Mapping):
            merged[key] = _merge(old, value)
        elif isinstance(old, list) and isinstance(value, Mapping) and all(_index(k, old) for k in value):
            merged[key] = list(old)
            for k, change in value.items():
                item = old[int(k)]
                whole = not (isinstance(item, dict) and isinstance(change, Mapping))
                merged[key][int(k)] = change if whole else _merge(item, change)
        else:
            merged[key] = value
    return merged


def _index(key: Any, items: list[Any]) -> bool:
    return str(key).isdigit() and int(key) < len(items)


def _build(cls: Any, tree: Any, place: str) -> Any:
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{place}: expected a mapping of keys to values, got {tree!r}")
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        name = f"{place}.{key}" if place else str(key)
        if key not in hints:
            raise ConfigError(_unknown(name, str(key), place, cls))
        hint = hints[key]
        nested = dataclasses.is_dataclass(hint)
        values[key] = _build(hint, {} if value is None else value, name) if nested else _typed(hint, value, name)
    return cls(**values)


def _unknown(name: str, key: str, place: str, cls: Any) -> str:
    """What is wrong with a key, the nearest one first among those of its own mapping."""
    own = [f.name for f in dataclasses.fields(cls)]
    near = [f"{place}.{match}" if place else match for match in difflib.get_close_matches(key, own, 1)]
    near = near or [path for path in _paths(Config) if path.split(".")[-1] == key]
    near = near or difflib.get_close_matches(name, _paths(Config), 1, cutoff=0)
    return f"unknown key {name!r}; the nearest is {near[0]!r}. Keys here: {', '.join(own)}"


def _paths(cls: Any, place: str = "") -> list[str]:
    hints = typing.get_type_hints(cls)
    paths = []
    for f in dataclasses.fields(cls):
        name = f"{place}.{f.name}" if place else f.name
        paths += [name, *(_paths(hints[f.name], name) if dataclasses.is_dataclass(hints[f.name]) else [])]
    return paths


def _typed(hint: Any, value: Any, name: str) -> Any:
    """``value`` if it is of the type of the field; whole numbers and ``1e-3`` (text, in YAML 1.1) count as floats."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _typed(next(argument for argument in arguments if argument is not type(None)), value, name)
    if origin is Literal:
        if value in arguments:
            return value
        raise ConfigError(f"{name}: expected {' or '.join(map(str, arguments))}, got {value!r}")
    if origin is list and isinstance(value, list):
        if dataclasses.is_dataclass(arguments[0]):
            return [_build(arguments[0], item, f"{name}[{i}]") for i, item in enumerate(value)]
        return [_typed(arguments[0], item, f"{name}[{i}]") for i, item in enumerate(value)]
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    elif hint is Any:
        return value
    elif isinstance(value, origin or hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    raise ConfigError(f"{name}: expected {getattr(origin or hint, '__name__', hint)}, got {value!r}")
