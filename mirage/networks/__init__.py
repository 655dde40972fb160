"""Image restoration networks beside MIRAGE, in plain PyTorch, by the names of their published weights.

    network = mirage.networks.create("restormer", norm="BiasFree")

`names` lists them. Each is a `RestorationNetwork`: it takes images of any size, and says in ``config`` how it was
built.
"""

from __future__ import annotations

from mirage.networks.common import RestorationNetwork
from mirage.networks.nafnet import NAFNet
from mirage.networks.promptir import PromptIR
from mirage.networks.registry import create, names
from mirage.networks.restormer import Restormer
from mirage.networks.srresnet import SRResNet

__all__ = ["NAFNet", "PromptIR", "RestorationNetwork", "Restormer", "SRResNet", "create", "names"]
