"""Which modules of a model have a fast counterpart: told by their attributes and shapes, never by their class.

A module is recognised in two steps. `candidates` looks for the attributes that give a kind of module away; `problem`
then says why such a module cannot be replaced after all, or that it can. A module of another class than the
reference's has to pass a third: it must compute what its fast counterpart computes on a small random input.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mirage import blocks, model
from mirage.fast import modules as fast
from mirage.fast.block import BlockSequence, TransformerBlock
from mirage.fast.plain import HOOKS, is_dense_convolution


@dataclass(frozen=True)
class Kind:
    """A kind of module: what gives it away, what it must be like, and what replaces it.

    Modules of the class `reference` are of this kind where `applies` holds, modules of other classes where they have
    the attributes. What is `common` is found in any network: it is of its kind only outside modules of other kinds,
    and does not make a model one of MIRAGE's. A kind that does not `enclose` leaves what is in its modules to be found
    as if it were not there.
    """

    reference: type[nn.Module]
    replacement: type[nn.Module]
    attributes: tuple[str, ...]
    problem: Callable[[Any], str]
    channels: Callable[[Any], int]
    applies: Callable[[Any], bool] = lambda m: True
    common: bool = False
    enclose: bool = True


def _convolution_problem(
    module: nn.Module, name: str, *, inputs: int, outputs: int, size: int = 1, groups: int = 1, dims: int = 2
) -> str:
    """Why `module.<name>` is not the bias-free, stride-1, same-size convolution that the reference has."""
    conv = getattr(module, name)
    expected_class = nn.Conv2d if dims == 2 else nn.Conv1d
    if not isinstance(conv, expected_class):
        return f"{name} is {type(conv).__name__}, not {expected_class.__name__}"
    if conv.bias is not None:
        return f"{name} has a bias"
    if (conv.in_channels, conv.out_channels, conv.groups) != (inputs, outputs, groups):
        return (
            f"{name} has {conv.in_channels} input and {conv.out_channels} output channels in {conv.groups} groups, "
            f"not {inputs}, {outputs} and {groups}"
        )
    expected = {"kernel_size": size, "stride": 1, "padding": size // 2, "dilation": 1}
    for attribute, value in expected.items():
        if getattr(conv, attribute) != (value,) * dims:
            return f"{name} has {attribute} {getattr(conv, attribute)}, not {(value,) * dims}"
    if conv.padding_mode != "zeros":
        return f"{name} pads with {conv.padding_mode!r}, not with zeros"
    return ""


def _first(*problems: str) -> str:
    return next((p for p in problems if p), "")


def _gelu_problem(name: str, module: object) -> str:
    if not isinstance(module, nn.GELU):
        return f"{name} is {type(module).__name__}, not GELU"
    return "" if module.approximate == "none" else f"{name} is an approximate GELU ({module.approximate})"


def _shape_problem(module: nn.Module, **shapes: tuple[int, ...]) -> str:
    for name, shape in shapes.items():
        value = getattr(module, name)
        if not isinstance(value, Tensor) or tuple(value.shape) != shape:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            return f"{name} is {found}, not of shape {shape}"
    return ""


# ---- the kinds -----------------------------------------------------------------------------------------------------


def _layer_norm_problem(m: Any) -> str:
    weight, bias = getattr(m.body, "weight", None), getattr(m.body, "bias", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1:
        return "body has no weight of shape [C]"
    if not isinstance(bias, Tensor) or bias.shape != weight.shape:
        return "body has no bias of the shape of its weight (a bias-free layer norm)"
    return ""


def _gated_cnn_problem(m: Any) -> str:
    if not hasattr(m, "kernel_generator"):
        return "its depthwise convolution has one learned kernel (dynamic_conv=False), none generated for each sample"
    if not isinstance(m.norm, nn.BatchNorm2d):
        return f"norm is {type(m.norm).__name__}, not BatchNorm2d"
    dim, generator = m.norm.num_features, m.kernel_generator
    hidden, taps = int(8 / 3 * dim), blocks.DYNAMIC_KERNEL_SIZE**2
    if not isinstance(generator, nn.Sequential) or len(generator) != 4:
        return "kernel_generator is not average pooling, convolution, GELU and convolution"
    if not isinstance(generator[0], nn.AdaptiveAvgPool2d) or generator[0].output_size not in (1, (1, 1)):
        return "kernel_generator does not begin with a global average"
    return _first(
        _convolution_problem(m, "gic1", inputs=dim, outputs=2 * hidden),
        _convolution_problem(m, "gic2", inputs=hidden, outputs=dim),
        _convolution_problem(m, "proj_out", inputs=dim, outputs=dim),
        _convolution_problem(generator, "1", inputs=dim, outputs=dim),
        _convolution_problem(generator, "3", inputs=dim, outputs=dim * taps),
        _gelu_problem("kernel_generator.2", generator[2]),
        _gelu_problem("act", m.act),
        _shape_problem(m, temperature=(1,)),
    )


def _attention_problem(m: Any) -> str:
    if not isinstance(m.temperature, Tensor) or m.temperature.dim() != 3:
        return "temperature is not of shape [heads, 1, 1]"
    if not isinstance(m.project_out, nn.Conv2d) or m.project_out.in_channels % 3:
        return "project_out is not a convolution of three branches"
    dim, branch, heads = m.project_out.in_channels, m.project_out.in_channels // 3, m.temperature.shape[0]
    if branch % heads:
        return f"{branch} channels do not divide into {heads} heads"
    if not isinstance(m.mlp, nn.Sequential) or len(m.mlp) != 3:
        return "mlp is not convolution, GELU and convolution"
    return _first(
        _convolution_problem(m, "qkv", inputs=branch, outputs=3 * branch),
        _convolution_problem(
            m, "qkv_dwconv", inputs=3 * branch, outputs=3 * branch, size=3, groups=3 * branch
        ),
        _convolution_problem(m, "project_out", inputs=dim, outputs=dim),
        _convolution_problem(m.mlp, "0", inputs=branch, outputs=2 * branch, dims=1),
        _convolution_problem(m.mlp, "2", inputs=2 * branch, outputs=branch, dims=1),
        _gelu_problem("mlp.1", m.mlp[1]),
        _shape_problem(m, temperature=(heads, 1, 1), alpha_att=(1,), alpha_gated=(1,), alpha_mlp=(1,)),
    )


def _feed_forward_problem(m: Any) -> str:
    if not isinstance(m.project_in, nn.Conv2d) or m.project_in.out_channels % 2:
        return "project_in is not a convolution to two halves"
    dim, hidden = m.project_in.in_channels, m.project_in.out_channels // 2
    return _first(
        _convolution_problem(m, "project_in", inputs=dim, outputs=2 * hidden),
        _convolution_problem(m, "dwconv", inputs=2 * hidden, outputs=2 * hidden, size=3, groups=2 * hidden),
        _convolution_problem(m, "project_out", inputs=hidden, outputs=dim),
        _gelu_problem("act", m.act),
    )


def _block_problem(m: Any) -> str:
    # What its children compute does not matter: those that are not fast are called as modules.
    for name in ("norm1", "attn", "norm2", "ffn"):
        if not isinstance(getattr(m, name), nn.Module):
            return f"{name} is {type(getattr(m, name)).__name__}, not a module"
    return ""


def _is_of_blocks(m: nn.Sequential) -> bool:
    kinds = [kind_of(child) for child in m]
    return bool(kinds) and all(kind is not None and kind.replacement is TransformerBlock for kind in kinds)


def _block_channels(m: Any) -> int:
    return next(m.norm1.parameters()).shape[0]


KINDS = (
    Kind(
        blocks.TransformerBlock,
        TransformerBlock,
        ("norm1", "attn", "norm2", "ffn"),
        _block_problem,
        _block_channels,
    ),
    Kind(blocks.LayerNorm, fast.LayerNorm, ("body",), _layer_norm_problem, lambda m: m.body.weight.shape[0]),
    Kind(
        blocks.GatedCNNBlock,
        fast.GatedCNNBlock,
        ("norm", "gic1", "act", "gic2", "drop_path", "proj_out", "temperature"),
        _gated_cnn_problem,
        lambda m: m.norm.num_features,
    ),
    Kind(
        blocks.Attention,
        fast.Attention,
        (
            *("qkv", "qkv_dwconv", "gatedcnn", "mlp", "project_out"),
            *("temperature", "alpha_att", "alpha_gated", "alpha_mlp"),
        ),
        _attention_problem,
        lambda m: m.project_out.in_channels,
    ),
    Kind(
        blocks.FeedForward,
        fast.FeedForward,
        ("project_in", "dwconv", "act", "project_out"),
        _feed_forward_problem,
        lambda m: m.project_in.in_channels,
    ),
    # No attribute gives these away: only the reference's own class counts.
    Kind(blocks.SPDCovariance, fast.SPDCovariance, (), lambda m: "", lambda m: 0),
    Kind(model.MIRAGE, fast.MIRAGE, (), lambda m: "", lambda m: m.config["in_channels"], enclose=False),
    Kind(nn.Sequential, BlockSequence, (), lambda m: "", lambda m: 0, lambda m: _is_of_blocks(m), enclose=False),
    Kind(nn.Conv2d, fast.Conv2d, (), lambda m: "", lambda m: m.in_channels, is_dense_convolution, common=True),
    Kind(nn.PixelShuffle, fast.PixelShuffle, (), lambda m: "", lambda m: m.upscale_factor**2, common=True),
    Kind(nn.PixelUnshuffle, fast.PixelUnshuffle, (), lambda m: "", lambda m: 1, common=True),
)


def candidates(root: nn.Module) -> Iterator[tuple[str, nn.Module, Kind | None]]:
    """Every module of `root` with its path and the kind it looks like."""
    inside: set[nn.Module] = set()
    for path, module in root.named_modules():
        kind = kind_of(module)
        if kind is not None and kind.common and module in inside:
            kind = None
        if kind is not None and not kind.common and kind.enclose:
            inside.update(module.modules())
        yield path, module, kind


def kind_of(module: nn.Module) -> Kind | None:
    """The kind that a module is of, already replaced or not, or that it looks like."""
    for kind in KINDS:
        if isinstance(module, kind.replacement) or (type(module) is kind.reference and kind.applies(module)):
            return kind
        if not kind.attributes or not all(hasattr(module, name) for name in kind.attributes):
            continue
        if kind.attributes == ("body",) and isinstance(module.body, nn.Sequential):
            continue  # down- and upsampling keep their layers in a `body` too
        return kind
    return None


def problem(module: nn.Module, kind: Kind) -> str:
    """Why a module of this kind is not replaced; empty when it can be."""
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a TorchScript module"
    found = kind.problem(module)
    if found or (type(module) is kind.reference and not _hides_a_method(module)):
        return found
    return _behaviour_problem(module, kind)


def _hides_a_method(module: nn.Module) -> bool:
    """Whether an attribute of the instance has the name of a method of its class, which may call that."""
    return any(callable(getattr(type(module), name, None)) for name in vars(module))


def _behaviour_problem(module: nn.Module, kind: Kind) -> str:
    """Whether a module of an unknown class computes, in eval mode, what its replacement does."""
    parameter = next(module.parameters())
    if parameter.is_meta:
        return "its weights are on the meta device, so what it computes cannot be compared"
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            original = _without_hooks(copy.deepcopy(module)).float().eval()
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(2, kind.channels(module), 8, 8, generator=generator).to(parameter.device)
            expected = original(x)
            original.__class__ = kind.replacement
            value = original(x)
        except Exception as error:  # whatever a foreign forward raises
            return f"comparing it with {kind.replacement.__name__} failed: {error}"
    if not isinstance(expected, Tensor) or expected.shape != value.shape:
        return f"it does not return what {kind.replacement.__name__} returns"
    error = ((value - expected).norm() / expected.norm().clamp_min(1e-30)).item()
    if not error < 1e-4:
        return f"it computes something else than {kind.replacement.__name__} (relative difference {error:.1e})"
    return ""


def _without_hooks(module: nn.Module) -> nn.Module:
    for child in module.modules():
        for name in HOOKS:
            getattr(child, name).clear()
    return module
