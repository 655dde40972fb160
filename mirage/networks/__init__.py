"""Image restoration networks beside MIRAGE, in plain PyTorch, by the names of their published weights.

    network = mirage.networks.load("motion_deblurring.pth")  # which one it is, the file tells
    network = mirage.networks.create("restormer", norm="BiasFree")

`names` lists them, `save` writes a file that `load` reads. Each is a `RestorationNetwork`: it takes images of any size,
and says in ``config`` how it was built.
"""

from __future__ import annotations

from mirage.networks import published
from mirage.networks.common import RestorationNetwork
from mirage.networks.identify import Identified, identify
from mirage.networks.loading import load, save
from mirage.networks.nafnet import NAFNet
from mirage.networks.promptir import PromptIR
from mirage.networks.registry import create, names
from mirage.networks.restormer import Restormer
from mirage.networks.srresnet import SRResNet

__all__ = [
    "Identified",
    "NAFNet",
    "PromptIR",
    "RestorationNetwork",
    "Restormer",
    "SRResNet",
    "create",
    "identify",
    "load",
    "names",
    "published",
    "save",
]
