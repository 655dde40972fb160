"""Low-rank adaptation (LoRA, arXiv 2106.09685) of every convolution of a network, in place: how the experts of
UniRestorer (arXiv 2412.20157) differ from the network that they have in common.

A convolution with the weight W, of C_in to C_out channels in g groups, with a kernel of k x k, gets

    W' = W + (alpha / rank) reshape(B A, W.shape)        A [rank k, C_in k],  B [C_out / g k, rank k]

so dense, grouped and depthwise ones have one formula. Kernels of other shapes count by their first side:
A [rank k_1, C_in k_2 ...]. While it is adapted, ``<conv>.weight`` of the state dict is called ``<conv>.conv.weight``,
and there are ``<conv>.lora_A`` and ``<conv>.lora_B`` besides: the names of loralib and of the released code.

What is adapted is each `torch.nn.Conv1d`, `Conv2d` and `Conv3d`, in whatever module it lies. Kernels that a network
generates for each image, as the gated branch of MIRAGE does, are no weights; the convolutions that generate them are
adapted. Biases of convolutions, linear layers and learned tensors such as PromptIR's prompts stay the base's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = [
    "LoRAConv",
    "LoRASettings",
    "adapters",
    "add_lora",
    "add_low_rank",
    "fold",
    "has_lora",
    "lora_parameters",
    "lora_settings",
    "merged_weight",
    "remove_lora",
    "reset_small",
    "small_parameters",
    "statistics",
    "unfold",
]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_SETTINGS = "_mirage_lora_settings"
_FOLDED = "_mirage_lora_folded"
Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class LoRASettings:
    """How a network was adapted.

    Attributes:
        rank: of A B for a kernel of 1x1; a kernel of k x k has k times as much.
        alpha: what is added to the weights is multiplied by ``alpha / rank``.
        norms: norms, temperatures and other small parameters outside the convolutions are the expert's own, too.
    """

    rank: int = 8
    alpha: float = 16.0
    norms: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank: expected an integer of at least 1, got {self.rank!r}")
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, (int, float)) or not math.isfinite(self.alpha):
            raise ValueError(f"alpha: expected a finite number, got {self.alpha!r}")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class _Record:
    """What a network keeps of how it was before: which parameters had gradients, and copies of what its experts have of
    their own besides adapters."""

    settings: LoRASettings
    trained: frozenset[str]
    small: Mapping[str, Tensor]


@dataclass(frozen=True)
class _Folded:
    """What a folded convolution keeps: its adapter, and the base's weight, which comes back by `unfold`."""

    adapter: LoRAConv
    weight: nn.Parameter


def merged_weight(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float) -> Tensor:
    """``weight + scale * reshape(lora_B @ lora_A, weight.shape)``, in the tensors' own dtype under autocast, too.

    Args:
        weight: ``[C_out, C_in / g, k_1, k_2, ...]``.
        lora_A, lora_B: ``[rank k_1, C_in k_2 ...]`` and ``[C_out / g k_1, rank k_1]``.
    """
    with torch.autocast(weight.device.type, enabled=False):
        return add_low_rank(weight, lora_A, lora_B, scale)


def add_low_rank(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """`merged_weight` without a word about autocast, and where no gradient is wanted into ``out``."""
    return torch.add(weight, (lora_B @ lora_A).view(weight.shape), alpha=scale, out=out)


class LoRAConv(nn.Module):
    """A convolution and its adapter, in the place of the convolution. A new one computes what that does, bit for bit:
    A is Kaiming-uniform (a = sqrt 5), B is 0.

    The convolution's settings (``in_channels``, ``kernel_size``, ``bias``, ...) can be read from it, and its ``weight``
    is the sum.

    Args:
        conv: a `torch.nn.Conv1d`, `Conv2d` or `Conv3d`; kept, with a weight that is not trained.
        settings: rank and alpha.

    Attributes:
        conv: the convolution.
        lora_A, lora_B: ``[rank k_1, C_in k_2 ...]`` and ``[C_out / groups k_1, rank k_1]``, of the dtype and on the
            device of the convolution's weight.
    """

    def __init__(self, conv: Any, settings: LoRASettings) -> None:
        super().__init__()
        rank, first, rest = settings.rank, conv.kernel_size[0], math.prod(conv.kernel_size[1:])
        self.settings = settings
        self.conv = conv
        self.lora_A = nn.Parameter(conv.weight.new_empty(rank * first, conv.in_channels * rest))
        self.lora_B = nn.Parameter(conv.weight.new_zeros(conv.out_channels // conv.groups * first, rank * first))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.train(conv.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            conv = self.__dict__.get("_modules", {}).get("conv")
            if conv is None or name.startswith("_"):
                raise
            return getattr(conv, name)

    @property
    def weight(self) -> Tensor:
        """What it convolves with: the base's weight and what is added."""
        return merged_weight(self.conv.weight, self.lora_A, self.lora_B, self.settings.scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv._conv_forward(x, self.weight, self.conv.bias)

    def extra_repr(self) -> str:
        return f"rank={self.settings.rank}, alpha={self.settings.alpha:g}"


# --- adding and removing


def add_lora(
    network: Network,
    rank: int = 8,
    alpha: float = 16.0,
    *,
    norms: bool = True,
    exclude: tuple[str, ...] = (),
) -> Network:
    """Adapt every convolution of a network in place, freeze what it had, and return it.

    The network computes what it did, bit for bit, until it is trained. Gradients go to the adapters alone, and with
    ``norms`` to the parameters outside convolutions and linear layers that are vectors or scalars: norms, temperatures,
    the factors of MIRAGE's branches and NAFNet's blocks. Running statistics of batch norms follow the data in training
    mode, as ever, and belong to the expert with and without ``norms``.

    The network may be of plain modules or of `mirage.fast`. Fast blocks call their modules one by one while these are
    adapted, which rounds otherwise than their operators do; `fold` lets these run again, and gives the same bits.

    Args:
        network: any module, with convolutions below it.
        rank: see the head of this module; at least 1.
        alpha: what is added is multiplied by ``alpha / rank``.
        norms: train those, too.
        exclude: names of convolutions, or of modules that hold some, which are left as they are (frozen).

    Raises:
        TypeError: ``network`` is no module.
        ValueError: it has no convolutions, is one itself, is adapted already, or has one that cannot be adapted:
            transposed, parametrized, with hooks, with a forward of its own. The network is untouched then.
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"network: expected a torch.nn.Module, got {type(network).__name__}")
    settings = LoRASettings(rank, alpha, norms)
    if _record(network) is not None:
        raise ValueError("network: it has LoRA already; remove_lora takes it away")
    if isinstance(network, CONVOLUTIONS):
        raise ValueError(f"network: expected one with convolutions below it, got a {type(network).__name__} itself")
    chosen = {}
    for name, module in network.named_modules():
        left_out = any(f"{name}.".startswith(f"{other}.") for other in exclude)
        if isinstance(module, CONVOLUTIONS + TRANSPOSED) and not left_out:
            _check_convolution(name, module)
            chosen[module] = name
    if not chosen:
        raise ValueError(f"network: expected one with convolutions, {type(network).__name__} has none to be adapted")
    trained = frozenset(name for name, parameter in network.named_parameters() if parameter.requires_grad)
    state = network.state_dict()
    small = {name: state[name].clone() for name in (*small_parameters(network), *statistics(network))}
    network.requires_grad_(False)
    for name in small_parameters(network) if norms else ():
        network.get_parameter(name).requires_grad_(True)
    _replace(network, {conv: LoRAConv(conv, settings) for conv in chosen})
    vars(network)[_SETTINGS] = _Record(settings, trained, small)
    return network


def remove_lora(network: Network) -> Network:
    """Take the adapters of `add_lora` away in place, and return the network: it is the base again, bit for bit, with
    its norms and running statistics.

    Raises:
        ValueError: it has no LoRA.
    """
    root, record = _rooted(network)
    unfold(network)
    reset_small(network)
    _replace(network, {adapter: adapter.conv for _, adapter in adapters(network)})
    del vars(root)[_SETTINGS]
    for name, parameter in root.named_parameters():
        parameter.requires_grad_(name in record.trained)
    return network


@torch.no_grad()
def reset_small(network: nn.Module) -> None:
    """Give an adapted network the norms, temperatures and running statistics that it had before."""
    root, record = _rooted(network)
    state = root.state_dict()
    for name, value in record.small.items():
        state[name].copy_(value)


def _check_convolution(name: str, conv: nn.Module) -> None:
    """Refuse one whose result is not `_conv_forward` of its weight."""
    from mirage.fast.recognise.pattern import bypass_problem

    problem = bypass_problem(conv)
    if isinstance(conv, TRANSPOSED):
        problem = "it is transposed"
    elif not problem and not _has_plain_forward(conv):
        problem = f"its class {type(conv).__name__} has a forward of its own"
    if problem:
        raise ValueError(f"network: {name} cannot be adapted: {problem}; leave it out with exclude=({name!r},)")


def _has_plain_forward(conv: nn.Module) -> bool:
    from mirage import fast

    forwards = {kind.forward for kind in (*CONVOLUTIONS, fast.Conv2d)}
    inner = next(kind for kind in CONVOLUTIONS if isinstance(conv, kind))
    return type(conv).forward in forwards and type(conv)._conv_forward is inner._conv_forward  # type: ignore[attr-defined]


def small_parameters(network: nn.Module) -> list[str]:
    """Names of the vectors and scalars outside convolutions and linear layers: norms, temperatures, factors."""
    found = []
    for path, module in network.named_modules():
        if isinstance(module, (LoRAConv, *CONVOLUTIONS, *TRANSPOSED, nn.Linear, nn.Bilinear, nn.Embedding)):
            continue
        for name, parameter in module.named_parameters(path, recurse=False):
            if parameter.numel() == max(parameter.shape, default=1):
                found.append(name)
    return found


def _replace(network: nn.Module, new: dict[Any, nn.Module]) -> None:
    """Other modules in the place of some, wherever they are held, also more than once."""
    for parent in list(network.modules()):
        if parent in new.values():
            continue
        for name, child in parent._modules.items():
            if child in new:
                parent._modules[name] = new[child]


# --- folding


@torch.no_grad()
def fold(network: Network) -> Network:
    """Put plain convolutions with the summed weights in the place of adapted ones, in place; returns the network.

    The network then is what it was before `add_lora` but for its weights: its state dict has the network's own names,
    `mirage.fast.accelerate` recognises it, `mirage.save_checkpoint` and `mirage.networks.save` write it as a network
    of its own. Base and adapters are kept for `unfold`. Folding twice does nothing more.

    Raises:
        ValueError: it has no LoRA.
    """
    _rooted(network)
    folded = {}
    for _, adapter in adapters(network):
        conv, base = adapter.conv, adapter.conv.weight
        weight = nn.Parameter(adapter.weight, requires_grad=False)
        vars(conv)[_FOLDED] = _Folded(adapter, base)
        conv.weight = weight
        folded[adapter] = conv
    _replace(network, folded)
    return network


def unfold(network: Network) -> Network:
    """Undo `fold` in place; returns the network. The base's weights are those from before, bit for bit: they were kept,
    and nothing is subtracted. Where the network was converted or moved meanwhile, base and adapters are now.

    Raises:
        ValueError: it has no LoRA.
    """
    _rooted(network)
    back: dict[Any, nn.Module] = {}
    for module in network.modules():
        kept = vars(module).get(_FOLDED)
        if kept is None:
            continue
        weight: Any = module.weight
        del vars(module)[_FOLDED]
        module.weight = kept.weight
        kept.adapter.to(device=weight.device, dtype=weight.dtype).train(module.training)
        back[module] = kept.adapter
    _replace(network, back)
    return network


# --- looking


def adapters(network: nn.Module) -> list[tuple[str, LoRAConv]]:
    """The adapters of a network that are in place, with the names of their convolutions; none of a folded one."""
    return [(name, module) for name, module in network.named_modules() if isinstance(module, LoRAConv)]


def has_lora(network: nn.Module) -> bool:
    """Whether a network, or one in it, was adapted."""
    return _record(network) is not None


def lora_settings(network: nn.Module) -> LoRASettings:
    """How a network was adapted.

    Raises:
        ValueError: it has no LoRA.
    """
    return _rooted(network)[1].settings


def lora_parameters(network: nn.Module) -> Iterator[nn.Parameter]:
    """What an optimizer is to train: the adapters, and norms where `add_lora` was told so.

    Raises:
        ValueError: the network has no LoRA, or is folded.
    """
    _rooted(network)
    if not adapters(network):
        raise ValueError("network: it is folded; unfold it before training")
    return (parameter for parameter in network.parameters() if parameter.requires_grad)


def statistics(network: nn.Module) -> list[str]:
    """Names of the running statistics of batch norms."""
    return [
        f"{path}.{name}" if path else name
        for path, module in network.named_modules()
        if isinstance(module, _NormBase)
        for name, _ in module.named_buffers(recurse=False)
    ]


def _record(network: nn.Module) -> _Record | None:
    return next((vars(m)[_SETTINGS] for m in network.modules() if _SETTINGS in vars(m)), None)


def _rooted(network: nn.Module) -> tuple[nn.Module, _Record]:
    """The module that `add_lora` was given, perhaps inside a wrapper, and what it keeps."""
    for module in network.modules():
        if _SETTINGS in vars(module):
            return module, vars(module)[_SETTINGS]
    raise ValueError("network: it has no LoRA; add_lora gives it some")
