"""Which modules of a model have a fast counterpart: told by their attributes and shapes, never by their class.

A module is recognised in two steps. `candidates` looks for the names that give a kind of module away; `problem` then
says why such a module cannot be replaced after all, by the pattern of its kind, or that it can. A module of another
class than the reference's has to pass a third: it must compute what its fast counterpart computes on a small random
input.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mirage import blocks, model
from mirage.fast import modules as fast
from mirage.fast import networks as whole
from mirage.fast.block import BlockSequence, DecoderBlock, EncoderBlock, NAFBlock, RestormerBlock, TransformerBlock
from mirage.fast.experts import Expert, ExpertAdapter, ExpertSequence, FourierAttention
from mirage.fast.frequencies import FrequencyModule, split
from mirage.fast.recognise import adair_module, mirage_block, moce_ir_block, nafnet_block, restormer_block
from mirage.fast.recognise.parts import (
    is_biased_convolution,
    is_dense_convolution,
    is_depthwise_convolution,
    is_halving_convolution,
)
from mirage.fast.recognise.pattern import HOOKS, Pattern
from mirage.networks import nafnet, promptir, restormer


@dataclass(frozen=True)
class Kind:
    """A kind of module: what gives it away, what it must be like, and what replaces it.

    Modules of the class `reference` are of this kind where `applies` holds, modules of other classes where they have
    the children and tensors of the `pattern` (or the attributes `known_by`) and none of those that the kind is
    `known_without`; None is no attribute. What is `common` is found in any network: it is of its kind only outside
    modules of other kinds, and does not make a model one of MIRAGE's. A kind that does
    not `enclose` leaves what is in its modules to be found as if it were not there. `channels`: of the image on which
    two classes are compared; `inputs`: the shapes of all that they are called with, where that is something else;
    `besides`: what else is compared, of the module and its inputs, where a call on small ones does not show all.
    """

    reference: type[nn.Module]
    replacement: type[nn.Module]
    channels: Callable[[Any], int]
    pattern: Pattern | None = None
    known_by: tuple[str, ...] = ()
    known_without: tuple[str, ...] = ()
    applies: Callable[[Any], bool] = lambda m: True
    common: bool = False
    enclose: bool = True
    inputs: Callable[[Any], tuple[tuple[int, ...], ...]] | None = None
    besides: Callable[..., Any] = lambda m, *inputs: ()

    def shapes(self, module: nn.Module) -> tuple[tuple[int, ...], ...]:
        """Of what the module and its replacement are called with to be compared."""
        return ((2, self.channels(module), 8, 8),) if self.inputs is None else self.inputs(module)

    def gives_itself_away(self, module: nn.Module) -> bool:
        """Whether a module of any class has the names of this kind."""
        if self.pattern is None:
            return False
        if any(_has(module, name) for name in self.known_without):
            return False
        if self.known_by:
            return all(_has(module, name) for name in self.known_by)
        children = (any(hasattr(module, n) for n in self.pattern.names_of(child)) for child in self.pattern.children)
        return all(hasattr(module, name) for name in self.pattern.tensors) and all(children)


def _has(module: Any, path: str) -> bool:
    for name in path.split("."):
        module = getattr(module, name, None)
        if module is None:
            return False
    return True


def _block_channels(m: Any) -> int:
    return next(m.norm1.parameters()).shape[0]


def _is_of_blocks(m: nn.Sequential) -> bool:
    kinds = [kind_of(child) for child in m]
    return bool(kinds) and all(kind is not None and hasattr(kind.replacement, "matcher") for kind in kinds)


def _frequencies(m: Any, image: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    """Low ones there are only of images of 128 pixels or more, but for halves instead of 128ths also of small ones."""
    result: tuple[Tensor, Tensor] = split(m, image, 2) if isinstance(m, FrequencyModule) else m.fft(image, n=2)
    return result


def _is_fast_convolution(m: nn.Conv2d) -> bool:
    kinds = (is_dense_convolution, is_biased_convolution, is_depthwise_convolution, is_halving_convolution)
    return any(is_one(m) for is_one in kinds)


KINDS = (
    Kind(
        restormer.RestormerBlock,
        RestormerBlock,
        _block_channels,
        restormer_block.BLOCK,
        known_by=("norm1", "norm2", "attn.temperature", "attn.qkv", "attn.qkv_dwconv", "ffn.project_in", "ffn.dwconv"),
        known_without=("attn.gatedcnn", "ffn.act"),
        enclose=False,
    ),
    Kind(
        EncoderBlock,
        EncoderBlock,
        lambda m: next(m.norms.parameters()).shape[0],
        moce_ir_block.BLOCK,
        known_by=("norms", "mixer.temperature", "mixer.qkv", "mixer.qkv_dwconv", "ffn.project_in", "ffn.dwconv"),
        known_without=("ffn.act",),
        enclose=False,
    ),
    Kind(
        DecoderBlock,
        DecoderBlock,
        lambda m: next(m.norms.parameters()).shape[0],
        moce_ir_block.DECODER_BLOCK,
        known_by=("norms", "shared.temperature", "adapter", "mixer.kv", "ffn.project_in", "ffn.dwconv"),
        known_without=("ffn.act",),
        enclose=False,
        inputs=lambda m: ((1, next(m.norms.parameters()).shape[0], 8, 8), (1, m.adapter.routing.freq_gate.in_features)),
    ),
    Kind(
        ExpertAdapter,
        ExpertAdapter,
        lambda m: m.proj_out.in_channels,
        moce_ir_block.ADAPTER,
        known_by=("routing.freq_gate", "experts", "proj_out", "num_experts", "top_k"),
        enclose=False,
        inputs=lambda m: (
            (1, m.proj_out.in_channels, 8, 8),
            (1, m.routing.freq_gate.in_features),
            (1, m.proj_out.in_channels, 8, 8),
        ),
    ),
    Kind(
        Expert,
        Expert,
        lambda m: m.proj[0].in_channels,
        moce_ir_block.EXPERT,
        known_by=("proj.0", "proj.1", "proj.2", "body.patch_size"),
        enclose=False,
        inputs=lambda m: ((2, m.proj[0].in_channels, 9, 13),) * 2,
    ),
    Kind(
        ExpertSequence,
        ExpertSequence,
        lambda m: m._modules["0"].proj[0].in_channels,
        moce_ir_block.EXPERT_SEQUENCE,
        known_by=("0.proj.0", "0.proj.1", "0.proj.2", "0.body.patch_size"),
        enclose=False,
        inputs=lambda m: ((2, m._modules["0"].proj[0].in_channels, 9, 13),) * 2,
    ),
    Kind(
        FourierAttention,
        FourierAttention,
        lambda m: m.q.in_channels,
        moce_ir_block.FOURIER_ATTENTION,
        known_by=("patch_size", "q", "q_dwconv", "kv", "kv_dwconv", "norm", "proj_out"),
        known_without=("temperature",),
        enclose=False,
        inputs=lambda m: ((2, m.q.in_channels, 9, 13),),
    ),
    Kind(
        FrequencyModule,
        FrequencyModule,
        lambda m: m.para1.shape[0],
        adair_module.MODULE,
        known_by=(*adair_module.CALLED, "para1", "para2"),
        enclose=False,
        inputs=lambda m: ((2, m.conv1.in_channels, 16, 16), (2, m.para1.shape[0], 8, 8)),
        besides=_frequencies,
    ),
    Kind(nafnet.NAFBlock, NAFBlock, lambda m: m.conv1.in_channels, nafnet_block.BLOCK),
    Kind(blocks.TransformerBlock, TransformerBlock, _block_channels, mirage_block.BLOCK),
    # Down- and upsampling keep their layers in a `body` too, which has no weight.
    Kind(
        blocks.LayerNorm,
        fast.LayerNorm,
        lambda m: m.body.weight.shape[0],
        mirage_block.NORM,
        known_by=("body.weight", "body.bias"),
    ),
    Kind(
        restormer.BiasFreeLayerNorm,
        fast.BiasFreeLayerNorm,
        lambda m: m.body.weight.shape[0],
        restormer_block.BIAS_FREE_NORM,
        known_by=("body.weight",),
        known_without=("body.bias",),
    ),
    Kind(blocks.GatedCNNBlock, fast.GatedCNNBlock, lambda m: m.norm.num_features, mirage_block.GATED_CNN),
    Kind(blocks.Attention, fast.Attention, lambda m: m.project_out.in_channels, mirage_block.ATTENTION),
    Kind(
        restormer.ChannelAttention,
        fast.ChannelAttention,
        lambda m: m.project_out.in_channels,
        restormer_block.ATTENTION,
        known_without=("gatedcnn",),
    ),
    Kind(
        fast.CrossChannelAttention,
        fast.CrossChannelAttention,
        lambda m: m.project_out.in_channels,
        moce_ir_block.CROSS_ATTENTION,
        enclose=False,
        inputs=lambda m: ((2, m.q.in_channels, 8, 8),) * 2,
    ),
    Kind(blocks.FeedForward, fast.FeedForward, lambda m: m.project_in.in_channels, mirage_block.FEED_FORWARD),
    Kind(
        restormer.GatedFeedForward,
        fast.GatedFeedForward,
        lambda m: m.project_in.in_channels,
        restormer_block.FEED_FORWARD,
        known_without=("act",),
    ),
    # Nothing gives these away: only the reference's own class counts.
    Kind(blocks.SPDCovariance, fast.SPDCovariance, lambda m: 0),
    *(
        Kind(reference, replacement, lambda m: m.config["in_channels"], enclose=False)
        for reference, replacement in (
            (model.MIRAGE, whole.MIRAGE),
            (restormer.Restormer, whole.Restormer),
            (promptir.PromptIR, whole.PromptIR),
            (nafnet.NAFNet, whole.NAFNet),
        )
    ),
    Kind(nn.Sequential, BlockSequence, lambda m: 0, applies=lambda m: _is_of_blocks(m), enclose=False),
    Kind(nn.Conv2d, fast.Conv2d, lambda m: m.in_channels, applies=_is_fast_convolution, common=True),
    Kind(nn.PixelShuffle, fast.PixelShuffle, lambda m: m.upscale_factor**2, common=True),
    Kind(nn.PixelUnshuffle, fast.PixelUnshuffle, lambda m: 1, common=True),
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
        if kind.gives_itself_away(module):
            return kind
    return None


def problem(module: nn.Module, kind: Kind) -> str:
    """Why a module of this kind is not replaced; empty when it can be."""
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a TorchScript module"
    found = "" if kind.pattern is None else kind.pattern.structure_problem(module, {})
    if found or (type(module) is kind.reference and not _hides_a_method(module)):
        return found
    return _behaviour_problem(module, kind)


def _hides_a_method(module: nn.Module) -> bool:
    """Whether an attribute of the instance has the name of a method of its class, which may call that."""
    return any(callable(getattr(type(module), name, None)) for name in vars(module))


def _behaviour_problem(module: nn.Module, kind: Kind) -> str:
    """Whether a module of an unknown class computes, in eval mode, what its replacement does."""
    parameter = next(module.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    if device.type == "meta":
        return "its weights are on the meta device, so what it computes cannot be compared"
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            original = _without_hooks(copy.deepcopy(module)).float().eval()
            generator = torch.Generator().manual_seed(0)
            inputs = [torch.randn(shape, generator=generator).to(device) for shape in kind.shapes(module)]
            _fill_zeros(original, generator)
            expected = _repeatable(kind, original, inputs)
            original.__class__ = kind.replacement
            value = _repeatable(kind, original, inputs)
        except Exception as raised:  # whatever a foreign forward raises
            return f"comparing it with {kind.replacement.__name__} failed: {raised}"
    if not expected or [t.shape for t in expected] != [t.shape for t in value]:
        return f"it does not return what {kind.replacement.__name__} returns"
    pairs = zip(value, expected, strict=True)
    error = max(((v - e).norm() / e.norm().clamp_min(1e-30)).item() for v, e in pairs)
    if not error < 1e-4:
        return f"it computes something else than {kind.replacement.__name__} (relative difference {error:.1e})"
    return ""


def _repeatable(kind: Kind, module: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    """The tensors that are compared, with the same draws in every call: MoCE-IR's experts are chosen by some."""
    torch.manual_seed(0)
    results = module(*inputs), kind.besides(module, *inputs)
    return [leaf for leaf in tree_leaves(results) if isinstance(leaf, Tensor)]


def _fill_zeros(module: nn.Module, generator: torch.Generator) -> None:
    """Other values for parameters that are all zero, as scales of branches are in a network that has not been trained:
    whatever such a branch computed, it would compare equal."""
    for parameter in module.parameters():
        if not parameter.any():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def _without_hooks(module: nn.Module) -> nn.Module:
    for child in module.modules():
        for name in HOOKS:
            getattr(child, name).clear()
    return module
