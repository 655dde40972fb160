"""LoRA in files: what an expert adds to its base. Files of loralib and PEFT are read where they mean the same.

A file of `save_lora` is a ``.safetensors`` with ``<conv>.lora_A`` and ``<conv>.lora_B`` of every adapted convolution,
the norms and temperatures that were trained, running statistics, and in its header rank, alpha, and a digest of the
base.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mirage.checkpoint import CheckpointError, read_content
from mirage.checkpoint.networks import some
from mirage.unirestorer.lora import (
    LoRAConv,
    LoRASettings,
    adapters,
    add_lora,
    lora_settings,
    reset_small,
    small_parameters,
    statistics,
    unfold,
)
from mirage.whole_files import safetensors_bytes, write_whole

__all__ = [
    "LORA_KEY",
    "base_digest",
    "check_base",
    "convolutions",
    "digest_of",
    "header_of",
    "load_lora",
    "lora_state",
    "problems_of",
    "save_lora",
]

LORA_KEY = "mirage_lora"
A, B = ".lora_A", ".lora_B"
PEFT_PREFIX, PEFT_CONFIG, PEFT_WEIGHTS = "base_model.model.", "adapter_config.json", "adapter_model.safetensors"
PEFT_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": ([], None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "use_qalora": (False, None),
    **dict.fromkeys(("use_bdlora", "kasa_config", "monteclora_config", "velora_config", "layer_replication"), (None,)),
}
"""Settings of PEFT that change what is computed, with the values under which it is what is computed here."""


def lora_state(network: nn.Module) -> dict[str, Tensor]:
    """What an adapted network has of its own: detached tensors that share its memory, under their names in its state
    dict. The frozen rest, `add_lora`'s base, is left out.

    Raises:
        ValueError: it has no LoRA, or is folded.
    """
    settings = lora_settings(network)
    found = _adapters_in_place(network)
    names = {f"{name}{end}" for name in found for end in (A, B)} | set(statistics(network))
    names |= set(small_parameters(network)) if settings.norms else set()
    return {name: value for name, value in network.state_dict().items() if name in names}


def header_of(network: nn.Module) -> dict[str, Any]:
    """What `save_lora` writes beside the tensors: rank, alpha, whether norms are among them, the base's digest."""
    settings = lora_settings(network)
    return {
        "rank": settings.rank,
        "alpha": settings.alpha,
        "norms": settings.norms,
        "base": base_digest(network),
        "base_dtype": _dtype_of(network),
    }


def save_lora(network: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write what an adapted network has of its own to a ``.safetensors`` file, whole or not at all.

    Raises:
        ValueError: the name does not end in ``.safetensors``, or the network has no LoRA, or is folded.
        FileNotFoundError: the folder does not exist.
    """
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {os.fspath(path)!r}")
    tensors = {name: value.cpu().contiguous().clone() for name, value in lora_state(network).items()}
    header = {"format": "pt", LORA_KEY: json.dumps(header_of(network))}
    write_whole(path, safetensors_bytes(tensors, header))


def load_lora(
    network: nn.Module, weights: str | os.PathLike[str] | Mapping[str, Tensor], *, alpha: float | None = None
) -> nn.Module:
    """Load what an expert adds to its base into a network, and return it, in place and unfolded.

    Files may be those of `save_lora`; of loralib, with or without the base's weights, which must be the network's; and
    folders (or their ``adapter_model.safetensors``) of PEFT. PEFT's adapter of a dense k x k convolution, a k x k one
    to ``rank`` channels and a 1x1 one from these, is one of ours of the same rank and is converted exactly;
    convolutions that a PEFT file leaves out are as the base's.

    Args:
        network: with LoRA of the file's rank, or without: then it gets it.
        weights: the file or folder, or what a file holds.
        alpha: for files that do not say it, as those of loralib.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file does not say alpha and it is not given, or it says another one.
        CheckpointError: the file is damaged or does not fit the network (all names that do not are told), it was
            trained on another base, or it is of a kind of PEFT's that computes something else; nothing is loaded
            then.
    """
    state, stored, path = _read(weights)
    adapted = _settings_or_none(network)
    if adapted is not None:
        unfold(network)
    if any(".lora_A." in name for name in state):
        state, stored = _from_peft(state, stored, network, path)
    given = stored.get("alpha", alpha)
    if given is None:
        raise ValueError(f"alpha: {path} does not say it, so it has to be given (what is added is times alpha / rank)")
    if alpha is not None and float(alpha) != float(given):
        raise ValueError(f"alpha: {path} says {given}, got {alpha}")
    rank = _rank(state, stored, network, path)
    settings = LoRASettings(rank, float(given), stored.get("norms", _holds_small(state, network)))
    if adapted is not None and (adapted.rank, adapted.alpha) != (settings.rank, settings.alpha):
        raise CheckpointError(
            f"{path}: has rank {settings.rank} and alpha {settings.alpha:g}, the network's LoRA has rank "
            f"{adapted.rank} and alpha {adapted.alpha:g}; remove_lora takes that away"
        )
    check_base(network, stored, path)
    problems = problems_of(network, state, settings)
    if problems:
        raise CheckpointError("\n".join([f"{path} does not fit {type(network).__name__}:", *problems]))
    if adapted is None:
        left_out = tuple(name for name in convolutions(network) if name + A not in state)
        add_lora(network, settings.rank, settings.alpha, norms=settings.norms, exclude=left_out)
    reset_small(network)
    network.load_state_dict(state, strict=False)
    return network


def base_digest(network: nn.Module) -> str:
    """Hexadecimal SHA-256 of the base's weights of all convolutions, whether they are adapted, folded or neither."""
    return digest_of(convolutions(network))


def digest_of(weights: Mapping[str, Tensor]) -> str:
    """`base_digest` of the weights of convolutions by the convolutions' names."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# --- what networks have


def convolutions(network: nn.Module) -> dict[str, Tensor]:
    """The base's weight of each convolution, by its name."""
    from mirage.unirestorer.lora import _FOLDED, CONVOLUTIONS

    found: dict[str, Tensor] = {}
    inside = set()
    for name, module in network.named_modules():
        if isinstance(module, LoRAConv):
            found[name] = module.conv.weight
            inside.add(module.conv)
        elif isinstance(module, CONVOLUTIONS) and module not in inside:
            kept = vars(module).get(_FOLDED)
            found[name] = module.weight if kept is None else kept.weight
    return found


def _sizes(network: nn.Module) -> dict[str, tuple[int, int, int]]:
    """Of each convolution the columns of A, the rows of B, and the first side of its kernel."""
    sizes = {}
    for name, module in network.named_modules():
        if name.endswith(".conv") and isinstance(network.get_submodule(name[: -len(".conv")]), LoRAConv):
            continue
        if isinstance(module, (LoRAConv, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            first, rest = module.kernel_size[0], math.prod(module.kernel_size[1:])
            sizes[name] = (module.in_channels * rest, module.out_channels // module.groups * first, first)
    return sizes


def _adapters_in_place(network: nn.Module) -> list[str]:
    found = [name for name, _ in adapters(network)]
    if not found:
        raise ValueError("network: it is folded; unfold it first")
    return found


def _settings_or_none(network: nn.Module) -> LoRASettings | None:
    try:
        return lora_settings(network)
    except ValueError:
        return None


def _dtype_of(network: nn.Module) -> str:
    return str(next(iter(convolutions(network).values())).dtype).removeprefix("torch.")


# --- reading


def _read(weights: Any) -> tuple[dict[str, Tensor], dict[str, Any], Path]:
    """Tensors, what is said beside them, and where that was."""
    if isinstance(weights, Mapping):
        return dict(weights), {}, Path("state dict")
    path = Path(weights)
    path = path / PEFT_WEIGHTS if path.is_dir() else path
    content, _ = read_content(path)
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path}: expected a mapping of names to tensors")
    stored: dict[str, Any] = {}
    if path.suffix == ".safetensors":
        import safetensors

        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(LORA_KEY)
        stored = {} if text is None else _mapping_of(text, path)
    if not stored and (config := path.with_name(PEFT_CONFIG)).is_file():
        stored = {"peft": _mapping_of(config.read_text(encoding="utf-8"), config)}
    return dict(content), stored, path


def _mapping_of(text: str, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{path}: what is said of LoRA is not readable: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected a mapping of settings, got {found!r}")
    return found


def _rank(state: Mapping[str, Tensor], stored: Mapping[str, Any], network: nn.Module, path: Path) -> int:
    """From the shapes, which must agree on it."""
    sizes = _sizes(network)
    found = set()
    for name, value in state.items():
        conv = name.removesuffix(A)
        if name.endswith(A) and conv in sizes and value.ndim == 2:
            found.add(value.shape[0] / sizes[conv][2])
    if stored.get("rank") is not None:
        found.add(stored["rank"])
    if not found:
        raise CheckpointError(f"{path}: holds no lora_A of a convolution of this network, but {some(list(state))}")
    (rank, *others) = sorted(found)
    if others or int(rank) != rank or rank < 1:
        raise CheckpointError(f"{path}: expected one rank for all convolutions, got {sorted(found)}")
    return int(rank)


def check_base(network: nn.Module, stored: Mapping[str, Any], what: str | Path, digest: str | None = None) -> None:
    """A file says which weights it was trained on; of another precision they cannot be compared.

    Args:
        network: the base.
        stored: what the file says.
        what: how to call the file.
        digest: the base's, where it is known.

    Raises:
        CheckpointError: it was trained on other weights.
    """
    known = stored.get("base")
    if known is None or stored.get("base_dtype") != _dtype_of(network):
        return
    if known != (digest or base_digest(network)):
        raise CheckpointError(f"{what}: was trained on another base than this {type(network).__name__}'s weights")


def _holds_small(state: Mapping[str, Tensor], network: nn.Module) -> bool:
    return any(name in state for name in small_parameters(network))


def problems_of(network: nn.Module, state: dict[str, Tensor], settings: LoRASettings) -> list[str]:
    """All that keeps a state dict from a network; the base's weights in it are compared, and taken out."""
    sizes, base = _sizes(network), convolutions(network)
    own = {_plain(name, sizes): value for name, value in network.state_dict().items()}
    wrong: dict[str, list[str]] = {"missing": [], "unexpected": [], "mis-shaped": [], "of another base": []}
    small = {*statistics(network), *(small_parameters(network) if settings.norms else ())}
    needed = {name + end for name, _ in adapters(network) for end in (A, B)}
    given = {name[: -len(A)] for name in state if name.endswith((A, B))} & sizes.keys()
    needed |= {name + end for name in given for end in (A, B)}
    needed |= small if _holds_small(state, network) else set()
    wrong["missing"] = sorted(needed - state.keys())
    for name in list(state):
        value, conv = state[name], name[: -len(A)]
        plain = _plain(name, sizes)
        if name.endswith((A, B)) and conv in sizes:
            columns, rows, first = sizes[conv]
            shape = (settings.rank * first, columns) if name.endswith(A) else (rows, settings.rank * first)
        elif plain in own:
            shape = tuple(own[plain].shape)
        else:
            wrong["unexpected"].append(name)
            continue
        if tuple(value.shape) != shape:
            wrong["mis-shaped"].append(f"{name} (expected {list(shape)}, got {list(value.shape)})")
        elif plain in own and plain not in small and not name.endswith((A, B)):
            kept = base.get(plain.removesuffix(".weight"), own[plain])
            if not torch.equal(kept.cpu(), value.cpu().to(kept.dtype)):
                wrong["of another base"].append(name)
            del state[name]
    return [f"  {len(names)} {what}: {some(names)}" for what, names in wrong.items() if names]


def _plain(name: str, convolutions: Collection[str]) -> str:
    """``<conv>.conv.weight`` as ``<conv>.weight``, where that is a convolution's."""
    head, found, leaf = name.rpartition(".conv.")
    return f"{head}.{leaf}" if found and head in convolutions else name


# --- PEFT


def _from_peft(
    state: Mapping[str, Tensor], stored: Mapping[str, Any], network: nn.Module, path: Path
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a PEFT adapter as ours, and its settings.

    PEFT adds B (A * x), A a convolution of the kernel's size to ``rank`` channels, and B a 1x1 one. With rows of A cut
    in k pieces of C_in k numbers, and each number of B times the unit matrix of k x k, that is the same sum.
    """
    config = stored.get("peft")
    if config is None:
        raise CheckpointError(f"{path}: looks like PEFT's, but there is no {PEFT_CONFIG} beside it, which says alpha")
    other = [f"{name}={config[name]!r}" for name, plain in PEFT_PLAIN.items() if config.get(name) not in plain]
    if config.get("peft_type", "LORA") != "LORA" or other:
        kind = config.get("peft_type")
        raise CheckpointError(f"{path}: PEFT's {kind} with {', '.join(other) or 'this type'} computes something else")
    modules = dict(network.named_modules())
    sizes = _sizes(network)
    ours: dict[str, Tensor] = {}
    refused = []
    for name, value in state.items():
        conv, _, rest = name.removeprefix(PEFT_PREFIX).rpartition(".lora_")
        module: Any = modules.get(conv)
        if conv not in sizes or rest not in ("A.weight", "B.weight"):
            refused.append(f"{name} (no convolution here)")
        elif module.groups != 1:
            refused.append(f"{name} (grouped: PEFT's adapter has another formula)")
        elif set(module.dilation) != {1} or module.padding_mode != "zeros":
            refused.append(f"{name} (PEFT's adapter has neither dilation nor other padding than zeros)")
        elif value.ndim < 3 or (rest == "B.weight" and math.prod(value.shape[2:]) != 1):
            refused.append(f"{name} (shape {list(value.shape)})")
        elif rest == "A.weight":
            ours[conv + A] = value.reshape(value.shape[0] * sizes[conv][2], -1)
        else:
            ours[conv + B] = torch.kron(value.flatten(1), torch.eye(sizes[conv][2], dtype=value.dtype))
    if refused:
        raise CheckpointError(f"{path}: {len(refused)} tensors of PEFT's have no counterpart: {some(refused)}")
    for name, adapter in adapters(network):
        if name + A not in ours:
            ours[name + A], ours[name + B] = adapter.lora_A.detach(), torch.zeros_like(adapter.lora_B)
    return ours, {"rank": config.get("r"), "alpha": config.get("lora_alpha"), "norms": False}
