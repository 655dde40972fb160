"""The model that restores: from a checkpoint, from weights that come with the package, or one that is there."""

from __future__ import annotations

import copy
import os
import warnings
from pathlib import Path

import torch
from torch import nn

__all__ = [
    "DTYPES",
    "check_network",
    "load_model",
    "packaged_features",
    "packaged_weights",
    "parse_dtype",
    "prepare_module",
    "resolve_device",
    "resolve_weights",
]

SUFFIX = ".safetensors"
FEATURES = "features"  # the folder of weights that describe images, in that of weights
DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


def load_model(
    weights: str | Path, *, fast: bool = True, device: str | torch.device = "cpu", key: str | None = None
) -> nn.Module:
    """The model of a checkpoint in evaluation mode on ``device``; with ``fast``, its modules replaced by the fast ones.

    Args:
        weights: a file, or the name of packaged weights; see `resolve_weights`. Of MIRAGE or of a network of
            `mirage.networks`: the file tells which.
        key: which network of the file, where it holds several; see ``mirage.networks.load``.

    Raises:
        ValueError, OSError: as ``mirage.networks.load`` does.
    """
    from mirage import networks

    model: nn.Module = networks.load(resolve_weights(weights), key=key).to(device)
    if fast:
        import mirage.fast

        with warnings.catch_warnings():
            if isinstance(model, networks.RestorationNetwork):
                warnings.simplefilter("ignore", UserWarning)  # of networks with nothing to be made faster
            mirage.fast.accelerate(model)
    return model


def check_network(model: nn.Module, attention: str) -> None:
    """Refuse what a network of `mirage.networks` cannot do; other modules are taken as they are.

    Raises:
        ValueError: its output is of another size or of other channels than its image, its image is neither grey nor
            RGB, or the mode is one of MIRAGE alone.
    """
    from mirage.networks import RestorationNetwork

    if not isinstance(model, RestorationNetwork):
        return
    name, channels = type(model).__name__, model.config["in_channels"]
    if model.scale != 1:
        raise ValueError(
            f"weights: expected a network whose output has the size of its image, got {name} for x{model.scale} "
            "super-resolution; mirage.networks.load(file) runs it on tensors"
        )
    if channels not in (1, 3) or model.config.get("out_channels", channels) != channels:
        raise ValueError(
            f"weights: expected a network from grey or RGB images to the same, got {name} from {channels} to "
            f"{model.config.get('out_channels', channels)} channels; mirage.networks.load(file) runs it on tensors"
        )
    if attention in ("local", "global"):
        raise ValueError(f"attention: {attention} is for MIRAGE alone, got {name}; expected auto, whole or tile")


def weight_folders() -> list[Path]:
    """Where packaged weights are looked for: inside the package, and beside it, as in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return [package / "weights", package.parent / "weights"]


def packaged_weights() -> dict[str, Path]:
    """The weights of this installation that restore: name -> ``.safetensors`` file. Nothing is downloaded."""
    return _files(weight_folders())


def packaged_features() -> dict[str, Path]:
    """Those that describe images and restore none, such as descriptors of degradations: name -> file."""
    return _files([folder / FEATURES for folder in weight_folders()])


def _files(folders: list[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(folder.glob(f"*{SUFFIX}")):
            found.setdefault(path.stem, path)
    return found


def resolve_weights(weights: str | os.PathLike[str]) -> Path:
    """The file that ``weights`` means: itself, or where there is no such file, the packaged weights of that name.

    Raises:
        FileNotFoundError: it has neither a folder nor a suffix, so it is no file's name, and no packaged weights have
            it; the message lists those that are there. (Other names of files that are not there come back as they are,
            for whoever reads them to report.)
    """
    path = Path(weights)
    if path.is_file() or path.suffix or path.name != str(weights):
        return path
    packaged = {**packaged_features(), **packaged_weights()}
    if path.name in packaged:
        return packaged[path.name]
    there = ", ".join(sorted(packaged_weights())) or "none in this installation"
    features = ", ".join(sorted(packaged_features()))
    also = f"; of descriptors and extractors: {features}" if features else ""
    raise FileNotFoundError(
        f"weights: no file {str(weights)!r}, and no packaged weights of that name; there are: {there}{also}"
    )


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """``"fp32"``, ``"bf16"``, ``"fp16"``, their long names or torch's dtypes; None stays None.

    Raises:
        ValueError: another one.
    """
    if dtype is None or dtype in DTYPES.values():
        return dtype  # type: ignore[return-value]
    if dtype in DTYPES:
        return DTYPES[dtype]  # type: ignore[index]
    raise ValueError(f"dtype: expected fp32, bf16 or fp16, got {str(dtype)!r}")


def resolve_device(device: str | torch.device) -> torch.device:
    """The device called ``device``; ``"auto"`` is the GPU where there is one.

    Raises:
        ValueError: PyTorch knows no such device, or has no CUDA device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device: expected auto, cpu or cuda[:N], got {device!r}") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: expected one that is there, got {device!r}: no CUDA device is available to PyTorch")
    return found


def prepare_module(
    module: nn.Module, *, fast: bool, device: torch.device | None, dtype: torch.dtype | None
) -> nn.Module:
    """A module that is there, ready to restore.

    One that `mirage.fast.accelerate` recognises is not touched: a copy of it, which shares its weights unless they have
    to be converted, is put in evaluation mode and accelerated. Another one is used itself, and put in evaluation mode.
    """
    from mirage.fast.swap import accelerate, candidates

    if any(kind is not None and not kind.common for _, _, kind in candidates(module)):
        tensors = [*module.parameters(), *module.buffers()]
        converted = any(_differs(t, device, dtype) for t in tensors)
        module = copy.deepcopy(module, {} if converted else {id(t): t for t in tensors})
        if fast:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # what was recognised may be unfit in detail: run as it is
                accelerate(module)
    if device is not None or dtype is not None:
        module.to(device=device, dtype=dtype)
    return module.eval()


def _differs(tensor: torch.Tensor, device: torch.device | None, dtype: torch.dtype | None) -> bool:
    return (device is not None and tensor.device != torch.empty(0, device=device).device) or (
        dtype is not None and tensor.is_floating_point() and tensor.dtype != dtype
    )
