"""The two halves of every kind of block, and every step outside the blocks, with the least that each has to do.

Bytes: what goes in and comes out, once, with the weights; with backward, the gradient of what comes out, the input
again, and the gradients of input and weights. Multiply-adds: those of the reference's products and convolutions, as
`torch.utils.flop_counter` counts them, three times with backward; GELUs, sigmoids and norms are not counted, and what a
backward pass recomputes is not either. Floors made of these are below what any implementation can reach.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mirage.fast
import mirage_kernels
from mirage import blocks
from mirage.networks import restormer
from mirage_kernels._runtime.cases import DIMS, levels
from mirage_kernels.mixer_stage import MixerWeights

HALVES = ("mixer", "ffn")
Function = Callable[[Tensor], Tensor]
Kind = tuple[int, int, int, int]  # channels, heads, height, width


@dataclass(frozen=True)
class Half:
    """Half a block, the reference's and ours on the same weights.

    Attributes:
        eager, fast: x to x + half(norm(x)).
        parameters: their parameters, those that have gradients.
        bytes_forward, bytes_both, macs_forward: see the top of this file.
    """

    eager: Function
    fast: Function
    parameters: tuple[Tensor, ...]
    bytes_forward: int
    bytes_both: int
    macs_forward: int


def block_kinds(variant: str, height: int, width: int) -> list[Kind]:
    """Of every kind of block for an image of height x width."""
    return [tuple(level) for level in levels(DIMS[variant], height, width)]


def count_macs(function: Callable[..., object], *inputs: Tensor) -> int:
    """Multiply-adds of one call."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function(*inputs)
    return counter.get_total_flops() // 2


def nbytes(*tensors: Tensor) -> int:
    return sum(t.nbytes for t in tensors)


def mixer_weights(block: blocks.TransformerBlock) -> MixerWeights:
    """The arguments of `mirage_kernels.mixer_stage` from a block."""
    norm, attn, cnn = block.norm1.body, block.attn, block.attn.gatedcnn
    return MixerWeights(
        norm_weight=norm.weight,
        norm_bias=norm.bias,
        qkv=attn.qkv.weight,
        qkv_dwconv=attn.qkv_dwconv.weight,
        temperature=attn.temperature,
        bn_weight=cnn.norm.weight,
        bn_bias=cnn.norm.bias,
        bn_mean=cnn.norm.running_mean,
        bn_var=cnn.norm.running_var,
        gic1=cnn.gic1.weight,
        generator_in=cnn.kernel_generator[1].weight,
        generator_out=cnn.kernel_generator[3].weight,
        gate_temperature=cnn.temperature,
        gic2=cnn.gic2.weight,
        proj_out=cnn.proj_out.weight,
        mlp_in=attn.mlp[0].weight,
        mlp_out=attn.mlp[2].weight,
        alpha_att=attn.alpha_att,
        alpha_conv=attn.alpha_gated,
        alpha_mlp=attn.alpha_mlp,
        project_out=attn.project_out.weight,
    )


def make_half(
    half: str,
    kind: Kind,
    training: bool,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Half:
    """One half of a block, in training or eval mode."""
    dim, heads, height, width = kind
    torch.manual_seed(0)
    block = blocks.TransformerBlock(dim, heads, drop_path=0.0).to(device, dtype).train(training)
    if half == "mixer":
        weights = mixer_weights(block)
        parameters = tuple(t for t in weights if t.requires_grad)

        def eager(x: Tensor) -> Tensor:
            return x + block.attn(block.norm1(x))

        def fast(x: Tensor) -> Tensor:
            return mirage_kernels.mixer_stage(x, weights, training=training).y
    else:
        norm, ffn = block.norm2, block.ffn
        convolutions = (ffn.project_in.weight, ffn.dwconv.weight, ffn.project_out.weight)
        parameters = (norm.body.weight, norm.body.bias, *convolutions)

        def eager(x: Tensor) -> Tensor:
            return x + ffn(norm(x))

        def fast(x: Tensor) -> Tensor:
            return mirage_kernels.feed_forward_stage(x, *parameters)

    unit, weight_bytes = dtype.itemsize * dim * height * width, nbytes(*parameters)
    return Half(
        eager,
        fast,
        parameters,
        bytes_forward=2 * unit + weight_bytes,
        bytes_both=5 * unit + 3 * weight_bytes,
        macs_forward=count_macs(eager, torch.empty(1, dim, height, width, device=device, dtype=dtype)),
    )


RESTORMER = ((48, 1, 1), (96, 1, 1), (96, 2, 2), (192, 4, 4), (384, 8, 8))
"""Channels, heads and downsampling of every kind of block of the published Restormer."""


def restormer_kinds(height: int, width: int) -> list[Kind]:
    """Of every kind of block of Restormer for an image of height x width."""
    return [(dim, heads, height // by, width // by) for dim, heads, by in RESTORMER]


def make_restormer_half(kind: Kind, norm: str = "WithBias", dtype: torch.dtype = torch.float32) -> Half:
    """The feed-forward half of a block of Restormer, on the CPU."""
    dim, heads, height, width = kind
    torch.manual_seed(0)
    block = restormer.RestormerBlock(dim, heads, 2.66, False, norm).to(dtype)
    fast = mirage.fast.accelerate(copy.deepcopy(block))
    run = type(fast).halves[1]

    def eager(x: Tensor) -> Tensor:
        return x + block.ffn(block.norm2(x))

    parameters = (*block.norm2.parameters(), *block.ffn.parameters())
    unit, weight_bytes = dtype.itemsize * dim * height * width, nbytes(*parameters)
    return Half(
        eager,
        lambda x: run(fast, x),
        parameters,
        bytes_forward=2 * unit + weight_bytes,
        bytes_both=5 * unit + 3 * weight_bytes,
        macs_forward=count_macs(eager, torch.empty(1, dim, height, width, dtype=dtype)),
    )


@dataclass(frozen=True)
class Step:
    """A step of the whole network's forward pass, with the input that it gets there."""

    run: Callable[[], object]
    bytes_forward: int
    macs_forward: int
    is_blocks: bool


STEPS = (
    *("patch_embed", "encoder_level1", "down1_2", "encoder_level2", "down2_3", "encoder_level3", "down3_4", "latent"),
    *("reduce_dim_level3", "up4_3", "concatenation 3", "reduce_chan_level3", "decoder_level3", "up3_2"),
    *("concatenation 2", "reduce_chan_level2", "decoder_level2", "up2_1", "concatenation 1", "decoder_level1"),
    *("refinement", "output"),
)
WHOLE = "the whole network"
CONCATENATED = {
    "concatenation 3": ("up4_3", "encoder_level3"),
    "concatenation 2": ("up3_2", "encoder_level2"),
    "concatenation 1": ("up2_1", "encoder_level1"),
}


@torch.no_grad()
def network_steps(model: nn.Module, image: Tensor) -> dict[str, Step]:
    """Every step of an accelerated network in eval mode, and the whole, by name.

    A step that the network does not call as a module of its own is left out.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: seen.update({name: (inputs[0].clone(), output)})

    hooks = [child.register_forward_hook(watch(name)) for name, child in model.named_children() if name in STEPS]
    restored = model(image)
    for hook in hooks:
        hook.remove()
    found = {}
    for name in STEPS:
        if name in seen:
            found[name] = _module_step(getattr(model, name), *seen[name])
        elif name in CONCATENATED and all(part in seen for part in CONCATENATED[name]):
            found[name] = _concatenation_step(*(seen[part][1] for part in CONCATENATED[name]))
    moved = nbytes(image, restored, *model.parameters())
    found[WHOLE] = Step(lambda: model(image), moved, count_macs(model, image), is_blocks=False)
    return found


def _module_step(module: nn.Module, x: Tensor, y: Tensor) -> Step:
    moved = nbytes(x, y, *module.parameters())
    is_blocks = isinstance(module, nn.Sequential)
    return Step(lambda: module(x), moved, count_macs(module, x), is_blocks)


def _concatenation_step(first: Tensor, second: Tensor) -> Step:
    return Step(lambda: torch.cat((first, second), dim=1), 2 * nbytes(first, second), 0, is_blocks=False)
