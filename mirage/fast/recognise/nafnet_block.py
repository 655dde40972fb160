"""The block of NAFNet: `mirage.networks.nafnet.NAFBlock`. Both halves are gated networks without activations; the first
has a depthwise convolution and scales its gated channels by a product with their means. What each adds to its input is
scaled by a number for each channel.
"""

from __future__ import annotations

from torch import nn

import mirage_kernels
from mirage.fast.recognise.parts import GLOBAL_AVERAGE, convolution, depthwise, sequence
from mirage.fast.recognise.pattern import Held, Pattern, Setting
from mirage.fast.recognise.stage import Stage
from mirage.networks.nafnet import NORM_EPS

NORM = Pattern(
    named=("LayerNorm2d", ("eps",)),
    tensors={"weight": Held("norm_weight", ("dim",)), "bias": Held("norm_bias", ("dim",))},
    takes={"eps": Setting("norm_eps", NORM_EPS)},
)
GATE = Pattern(named=("SimpleGate", ()))
DROPOUT = Pattern(one_of=(Pattern(nn.Identity), Pattern(nn.Dropout, changeable={"training": (False,)})))
FORM = ("centred", "none", "none")
"""Names of the norm, the activation and the gate."""


def _stage(children: dict[str, Pattern], scale: str) -> Stage:
    """`scale`: the parameter that scales the branch, behind the weights of the operator that the children hold."""
    held = set(Pattern(children=children).fields())
    return Stage(
        "feed_forward_stage",
        children,
        weights=[*(name for name in mirage_kernels.FeedForwardWeights._fields if name in held), "scale"],
        numbers=("norm_eps",),
        fixed=FORM,
        tensors={scale: Held("scale", (1, "dim", 1, 1))},
    )


_FIRST = {
    "norm1": NORM,
    "conv1": convolution("project_in", "dim", (2, "hidden"), bias="project_in_bias"),
    "conv2": depthwise("dwconv", (2, "hidden"), bias="dwconv_bias"),
    "sg": GATE,
    "sca": sequence(GLOBAL_AVERAGE, convolution("excite", "hidden", "hidden", bias="excite_bias")),
    "conv3": convolution("project_out", "hidden", "dim", bias="project_out_bias"),
    "dropout1": DROPOUT,
}
_SECOND = {
    "norm2": NORM,
    "conv4": convolution("project_in", "dim", (2, "wide"), bias="project_in_bias"),
    "sg": GATE,
    "conv5": convolution("project_out", "wide", "dim", bias="project_out_bias"),
    "dropout2": DROPOUT,
}
MIXER_STAGE = _stage(_FIRST, "beta")
FEED_FORWARD_STAGE = _stage(_SECOND, "gamma")
STAGES = (MIXER_STAGE, FEED_FORWARD_STAGE)
BLOCK = Pattern(
    children={**_FIRST, **_SECOND},
    tensors={name: held for stage in STAGES for name, held in stage.pattern.tensors.items()},
)
"""Its structure; its class is in `mirage.fast.block`, which asks the stages."""
