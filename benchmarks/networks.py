"""The networks that the CPU figures are of. To add one is to add an entry of `NETWORKS`.

AdaIR and MoCE-IR are built by their authors' code, from checkouts that whoever measures has (`--code`); nothing of it
is here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import mirage
from mirage import networks
from mirage.fast.frequencies import split
from mirage.losses import MirageLoss
from mirage.networks import published

Shape = tuple[int, int, int, int]
Loss = Callable[[nn.Module, Any, Tensor], Tensor]
MODES = ("inference", "forward", "step")


def square(side: int) -> Shape:
    return 1, 3, side, side


@dataclass(frozen=True)
class Network:
    """A network and what is asked of it.

    Attributes:
        label: its name in tables.
        build: of the folder with checkouts, and arguments in place of the published ones.
        shapes: of the images that a mode is timed at, by mode ("inference", "step").
        memory: of the image that a mode's memory is measured at, by mode.
        peers: names of the peers that run it, by "inference" and "training"; None for all.
        trial: arguments of a tiny one, to try a run with.
        code: its name in `mirage.networks.published`, where it needs a checkout.
        loss: of the model, its output and the clean image, of a training step.
        call: how it is called in training.
        without: peers that cannot run it, with the reason.
        prepare_export: changes a model in place into one that ONNX has the operators of.
        has_float32: it draws random numbers in evaluation too, and is in float32 in parts whatever its weights are in.
    """

    label: str
    build: Callable[..., nn.Module]
    shapes: Mapping[str, tuple[Shape, ...]]
    trial: Mapping[str, Any]
    memory: Mapping[str, Shape] = field(default_factory=lambda: MEMORY_SHAPES)
    peers: Mapping[str, tuple[str, ...]] | None = None
    code: str = ""
    loss: Loss = lambda model, restored, clean: nn.functional.l1_loss(restored, clean)
    call: Callable[[nn.Module, Tensor], Any] = lambda model, image: model(image)
    without: Mapping[str, str] = field(default_factory=dict)
    prepare_export: Callable[[Any], None] = lambda model: None
    has_float32: bool = False

    def missing(self, code: str) -> str:
        """Why it cannot be built with this folder of checkouts ("" for none); empty where it can."""
        return published.missing(self.code, code or None) if self.code else ""


_CRITERION = MirageLoss(preset="released")
MEMORY_SHAPES = {"inference": (1, 3, 1024, 1536), "forward": square(224), "step": square(128)}
FAMILY_PEERS = {"inference": ("eager", "openvino-f32", "fast", "fast-bf16"), "training": ("eager", "fast-low")}
LEVELS = {"num_blocks": [1, 1, 1, 1], "num_refinement_blocks": 1}


def _mirage(label: str, build: Callable[..., nn.Module]) -> Network:
    return Network(
        label,
        lambda code, **arguments: build(**arguments),
        shapes={"inference": (square(224), (1, 3, 512, 768)), "step": (square(128), (4, 3, 128, 128))},
        trial={},
        loss=lambda model, output, clean: _CRITERION(output, clean)[0],
        call=lambda model, image: model(image, return_spd=True),
    )


def _family(label: str, name: str, inference: tuple[int, ...], trial: dict[str, Any], **arguments: Any) -> Network:
    """One of `mirage.networks`."""
    return Network(
        label,
        lambda code, **others: networks.create(name, **{**arguments, **others}),
        shapes={"inference": tuple(map(square, inference)), "step": (square(128),)},
        trial=trial,
        peers=FAMILY_PEERS,
    )


def _released(label: str, name: str, trial: dict[str, Any], **others: Any) -> Network:
    """One of a checkout."""
    return Network(
        label,
        partial(published.create, name),
        shapes={"inference": (square(256),), "step": (square(128),)},
        trial=trial,
        peers=FAMILY_PEERS,
        code=name,
        **others,
    )


def _with_balance(model: nn.Module, restored: Tensor, clean: Tensor) -> Tensor:
    """MoCE-IR's own: what keeps its experts in use is added."""
    return nn.functional.l1_loss(restored, clean) + 0.01 * model.total_loss


def _without_transforms(model: Any) -> None:
    """AdaIR's frequencies by our products: ONNX and OpenVINO have no complex numbers to roll. So they are spared the
    transforms of the others."""
    for module in (model.fre1, model.fre2, model.fre3):
        module.fft = partial(split, module)


TINY_RESTORMER = {**LEVELS, "dim": 16, "heads": [1, 1, 2, 4]}
TINY_NAFNET = {"width": 8, "encoder_blocks": [1, 1], "middle_blocks": 1, "decoder_blocks": [1, 1]}
TINY_MOCE_IR = {**LEVELS, "dim": 16, "num_dec_blocks": [1, 1, 1]}
CHOOSES = "it chooses experts by the values in the image, and an exported graph has one choice alone"

TRANSFORMS = "it has Fourier transforms, which PyTorch has none of in bfloat16"

NETWORKS: dict[str, Network] = {
    "tiny": _mirage("MIRAGE-T", mirage.mirage_tiny),
    "small": _mirage("MIRAGE-S", mirage.mirage_small),
    "restormer": _family("Restormer", "restormer", (256, 512), TINY_RESTORMER),
    "promptir": _family("PromptIR", "promptir", (256,), {**LEVELS, "dim": 16, "heads": [1, 1, 2, 4]}),
    "nafnet32": _family("NAFNet, width 32", "nafnet", (512,), TINY_NAFNET),
    "nafnet64": _family("NAFNet, width 64", "nafnet", (512,), TINY_NAFNET, width=64),
    "adair": _released(
        *("AdaIR", "adair", TINY_RESTORMER),
        prepare_export=_without_transforms,
    ),
    "moce-ir-s": _released(
        *("MoCE-IR-S", "moce-ir-s", TINY_MOCE_IR),
        loss=_with_balance,
        without={"openvino-f32": CHOOSES, "fast-bf16": TRANSFORMS},
        has_float32=True,
    ),
}
MIRAGES = ("tiny", "small")


def make(name: str, code: str = "", trial: bool = False) -> nn.Module:
    """A network with the same random weights in every process, and nothing in it at a trivial start: neither the
    statistics of batch norms nor factors that are all 0 or 1."""
    network = NETWORKS[name]
    torch.manual_seed(0)
    model = network.build(code, **(network.trial if trial else {}))
    generator = torch.Generator().manual_seed(2)
    if name not in MIRAGES:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.numel() > 1 and (parameter == parameter.flatten()[0]).all():
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model


@contextmanager
def repeatable(name: str, dtype: torch.dtype, seed: int = 3) -> Iterator[None]:
    """A pass with the random numbers of every other one.

    MoCE-IR chooses experts by its draws, and is in float32 in parts, whatever its weights are in. In float64 it gets
    the draws of float32 (`torch.randn_like` of float64 has others), and is in float64 throughout.
    """
    torch.manual_seed(seed)
    if not NETWORKS[name].has_float32 or dtype != torch.float64:
        yield
        return
    randn_like, to_float, default = torch.randn_like, Tensor.float, torch.get_default_dtype()
    torch.randn_like = lambda like: randn_like(like, dtype=torch.float32).to(like.dtype)
    Tensor.float = Tensor.double
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.randn_like, Tensor.float = randn_like, to_float
        torch.set_default_dtype(default)
