"""The block of MIRAGE: x + attn(norm1(x)), then x + ffn(norm2(x)), as `mirage.blocks.TransformerBlock`.

Sizes are named after what they count: `dim` channels of the block, a `branch` of a third of them for attention, gated
CNN and MLP each, and the `hidden` channels of a gate.
"""

from __future__ import annotations

from torch import nn

import mirage_kernels
from mirage import blocks
from mirage.fast import modules as fast
from mirage.fast.recognise.parts import GELU, GLOBAL_AVERAGE, batch_norm, convolution, depthwise, drop_path, sequence
from mirage.fast.recognise.pattern import Held, Pattern, Setting
from mirage.fast.recognise.stage import Stage

NORM = Pattern(
    fast.LayerNorm,
    fast=True,
    children={
        "body": Pattern(
            tensors={"weight": Held("norm_weight", ("dim",)), "bias": Held("norm_bias", ("dim",))},
            takes={"eps": Setting("norm_eps", blocks.NORM_EPS)},
            says={"bias": "has no bias (a bias-free layer norm)"},
        )
    },
)

GATED_CNN = Pattern(
    fast.GatedCNNBlock,
    fast=True,
    tensors={"temperature": Held("gate_temperature", (1,))},
    children={
        "norm": batch_norm("bn", "branch", itself="batch_norm"),
        "gic1": convolution("gic1", "branch", (2, "hidden")),
        "act": GELU,
        "kernel_generator": sequence(
            GLOBAL_AVERAGE,
            convolution("generator_in", "branch", "branch"),
            GELU,
            convolution("generator_out", "branch", (blocks.DYNAMIC_KERNEL_SIZE**2, "branch")),
        ),
        "gic2": convolution("gic2", "hidden", "branch"),
        "drop_path": drop_path(itself="drop_path"),
        "proj_out": convolution("proj_out", "branch", "branch"),
    },
    instead={"kernel_generator": ("cconv", "has one learned depthwise kernel for all samples (dynamic_conv=False)")},
)

ATTENTION = Pattern(
    fast.Attention,
    fast=True,
    tensors={
        "temperature": Held("temperature", ("heads", 1, 1)),
        "alpha_att": Held("alpha_att", (1,)),
        "alpha_gated": Held("alpha_conv", (1,)),
        "alpha_mlp": Held("alpha_mlp", (1,)),
    },
    children={
        "qkv": convolution("qkv", "branch", (3, "branch")),
        "qkv_dwconv": depthwise("qkv_dwconv", (3, "branch")),
        "gatedcnn": GATED_CNN,
        "mlp": sequence(
            convolution("mlp_in", "branch", (2, "branch"), kind=nn.Conv1d),
            GELU,
            convolution("mlp_out", (2, "branch"), "branch", kind=nn.Conv1d),
        ),
        "project_out": convolution("project_out", (3, "branch"), (3, "branch")),
    },
)

FEED_FORWARD = Pattern(
    fast.FeedForward,
    fast=True,
    children={
        "project_in": convolution("project_in", "dim", (2, "hidden")),
        "dwconv": depthwise("dwconv", (2, "hidden")),
        "act": GELU,
        "project_out": convolution("project_out", "hidden", "dim"),
    },
)

MIXER_STAGE = Stage(
    "mixer_stage",
    {"norm1": NORM, "attn": ATTENTION},
    weights=mirage_kernels.MixerWeights._fields,
    numbers=("norm_eps", "bn_eps"),
    others=("batch_norm", "bn_momentum", "drop_path"),
)
FEED_FORWARD_STAGE = Stage(
    "feed_forward_stage",
    {"norm2": NORM, "ffn": FEED_FORWARD},
    weights=mirage_kernels.FeedForwardWeights._fields[:5],  # convolutions have no biases
    numbers=("norm_eps",),
    fixed=("centred", "gelu"),
)
STAGES = (MIXER_STAGE, FEED_FORWARD_STAGE)
BLOCK = Pattern(children={"norm1": NORM, "attn": ATTENTION, "norm2": NORM, "ffn": FEED_FORWARD})
"""Its structure; its class is in `mirage.fast.block`, which asks the stages."""
