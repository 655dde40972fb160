"""Modules of PyTorch as blocks have them: convolutions, activations, norms and sequences."""

from __future__ import annotations

from torch import nn

from mirage import blocks
from mirage.fast.recognise.pattern import Held, Pattern, Setting, Size
from mirage_kernels.dense_conv2d.op import SIZES as DENSE_SIZES
from mirage_kernels.dynamic_depthwise_conv2d.op import KERNEL_SIZES as DEPTHWISE_SIZES


def convolution(
    field: str,
    inputs: Size,
    outputs: Size,
    *,
    size: int = 1,
    kind: type[nn.Module] = nn.Conv2d,
    bias: str | None = None,
) -> Pattern:
    """The stride-1, zero-padded convolution of all channels that keeps the size of the image; without a bias, or with
    the field `bias` for one that may be there."""
    return Pattern(
        kind,
        sizes={"in_channels": inputs, "out_channels": outputs},
        settings={"groups": (1,), **_same_size(size, 1 if kind is nn.Conv1d else 2)},
        tensors=_weights(field, bias),
        absent=("bias",) if bias is None else (),
    )


def depthwise(field: str, channels: Size, *, size: int = 3, bias: str | None = None) -> Pattern:
    """As `convolution`, of each channel for itself."""
    return Pattern(
        nn.Conv2d,
        sizes={"in_channels": channels, "out_channels": channels, "groups": channels},
        settings=_same_size(size, 2),
        same=("groups", "out_channels", "in_channels"),
        tensors=_weights(field, bias),
        absent=("bias",) if bias is None else (),
    )


def _weights(field: str, bias: str | None) -> dict[str, Held]:
    held = {"weight": Held(field)}
    return held if bias is None else {**held, "bias": Held(bias, optional=True)}


def _same_size(size: int, dims: int) -> dict[str, tuple[object, ...]]:
    ones = (1,) * dims
    return {
        "kernel_size": ((size,) * dims,),
        "padding": ((size // 2,) * dims,),
        "stride": (ones,),
        "dilation": (ones,),
        "padding_mode": ("zeros",),
    }


def sequence(*modules: Pattern) -> Pattern:
    return Pattern(nn.Sequential, children={str(i): m for i, m in enumerate(modules)}, only=True)


def batch_norm(prefix: str, channels: Size, itself: str) -> Pattern:
    """A batch norm with weight, bias and running statistics that average exponentially: `prefix` with _weight, _bias,
    _mean, _var and _eps; and the module, whose statistics change in training."""
    return Pattern(
        nn.BatchNorm2d,
        sizes={"num_features": channels},
        changeable={"affine": (True,), "track_running_stats": (True,)},
        tensors={
            "weight": Held(f"{prefix}_weight"),
            "bias": Held(f"{prefix}_bias"),
            "running_mean": Held(f"{prefix}_mean", buffer=True),
            "running_var": Held(f"{prefix}_var", buffer=True),
        },
        takes={"eps": Setting(f"{prefix}_eps"), "momentum": Setting(f"{prefix}_momentum")},
        itself=itself,
        by_mode=True,
    )


GELU = Pattern(nn.GELU, settings={"approximate": ("none",)}, says={"approximate": "is an approximate GELU"})
GLOBAL_AVERAGE = Pattern(nn.AdaptiveAvgPool2d, settings={"output_size": (1, (1, 1))})


def drop_path(itself: str) -> Pattern:
    """None, or stochastic depth by a factor per sample: `mirage.blocks.DropPath` and that of timm."""
    kinds = (
        Pattern(nn.Identity),
        Pattern(blocks.DropPath, by_mode=True),
        Pattern(named=("DropPath", ("drop_prob",)), by_mode=True),
    )
    return Pattern(one_of=kinds, itself=itself)


DEPTHWISE_3X3 = depthwise("weight", "channels")
DENSE = tuple(convolution("weight", "inputs", "outputs", size=size) for size in DENSE_SIZES)
POINTWISE = convolution("weight", "inputs", "outputs", bias="bias")
BIASED_3X3 = convolution("weight", "inputs", "outputs", size=3, bias="bias")
THIN_CHANNELS = 4
HALVING = Pattern(
    nn.Conv2d,
    settings={
        "kernel_size": ((2, 2),),
        "stride": ((2, 2),),
        "padding": ((0, 0),),
        "dilation": ((1, 1),),
        "groups": (1,),
    },
)
DEPTHWISE = tuple(depthwise("weight", "channels", size=size, bias="bias") for size in DEPTHWISE_SIZES)


def is_dense_convolution(conv: nn.Conv2d) -> bool:
    """True for a convolution that is what `mirage_kernels.dense_conv2d` computes of its weight."""
    return any(pattern.settings_fit(conv) for pattern in DENSE)


def is_biased_convolution(conv: nn.Conv2d) -> bool:
    """True for one that is `mirage_kernels.dense_conv2d` plus a bias."""
    return POINTWISE.settings_fit(conv) or BIASED_3X3.settings_fit(conv)


def is_thin(conv: nn.Conv2d) -> bool:
    """True for a convolution of 1x1, or between an image and features. PyTorch's with a bias takes twice to four times
    as long there, and no longer at 3x3 where both sides have many channels."""
    return conv.kernel_size == (1, 1) or min(conv.in_channels, conv.out_channels) <= THIN_CHANNELS


def is_halving_convolution(conv: nn.Conv2d) -> bool:
    """True for one of all channels whose squares of 2x2 pixels lie side by side."""
    return HALVING.settings_fit(conv)


def is_depthwise_convolution(conv: nn.Conv2d) -> bool:
    """True for one that is `mirage_kernels.dynamic_depthwise_conv2d` with the same kernels for all samples, plus a
    bias where it has one."""
    return any(pattern.settings_fit(conv) for pattern in DEPTHWISE)
