"""MIRAGE for spandrel (PyPI ``spandrel``), by which chaiNNer and ComfyUI tell what network a file holds, and run it.

    import mirage.spandrel, spandrel

    mirage.spandrel.install()
    descriptor = spandrel.ModelLoader().load_from_file("mirage.ckpt")
    restored = descriptor(image)

spandrel does not know MIRAGE, and ``spandrel_extra_arches`` takes it for a Restormer, which has the same names for most
of its weights. Once installed here it is looked for before Restormer, whichever of the two is registered first.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import nn

from mirage.extras import not_there

if _missing := not_there("spandrel", "spandrel"):
    raise ImportError(_missing)

from spandrel import (
    MAIN_REGISTRY,
    Architecture,
    ArchRegistry,
    ArchSupport,
    ImageModelDescriptor,
    ModelTiling,
    SizeRequirements,
    StateDict,
)

import mirage.fast
from mirage.checkpoint import from_content, is_mirage
from mirage.checkpoint.networks import find_networks
from mirage.model import STRIDE

__all__ = ["MIRAGEArch", "install"]

ID = "MIRAGE"
NAMED = {24: "Tiny", 30: "Small"}
"""What the paper calls its networks, by their channels."""


def install(registry: ArchRegistry = MAIN_REGISTRY) -> bool:
    """Have spandrel recognise MIRAGE, from now on and in this process.

    Args:
        registry: of spandrel; the default is the one that every ``ModelLoader()`` without another uses.

    Returns:
        Whether it was added; False where it was there already.

    Raises:
        spandrel.DuplicateArchitectureError: the registry has an architecture of another origin by this name.
    """
    there = registry.get(ID)
    if there is not None and isinstance(there.architecture, MIRAGEArch):
        return False
    registry.add(ArchSupport.from_architecture(MIRAGEArch(), before=("Restormer",)))  # type: ignore[arg-type]
    return True


class MIRAGEArch(Architecture[nn.Module]):
    """What spandrel needs to know of MIRAGE: how a file is recognised, and what is made of it.

    Args:
        fast: put fast modules in place (`mirage.fast.accelerate`).
    """

    def __init__(self, fast: bool = True) -> None:
        super().__init__(id=ID, name="MIRAGE", detect=_is_mirage)
        self.fast = fast

    def load(self, state_dict: StateDict) -> ImageModelDescriptor[nn.Module]:
        """The network of any size, with its SPD head where the file has one, in evaluation mode on the CPU in float32.

        Raises:
            CheckpointError: the weights are incomplete, or of several networks; see `mirage.from_checkpoint`.

        Warns:
            CheckpointWarning: as `mirage.from_checkpoint`.
        """
        model = from_content(state_dict, None, Path("state dict"), None, {})
        config: dict[str, Any] = model.config
        if self.fast:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # where nothing can be replaced, it runs as it is
                mirage.fast.accelerate(model)
        named = [NAMED[config["dim"]]] if config["dim"] in NAMED else []
        return ImageModelDescriptor(
            model,
            model.state_dict(),
            architecture=self,
            purpose="Restoration",
            tags=[*named, f"{config['dim']}dim"],
            supports_half=True,
            supports_bfloat16=True,
            scale=1,
            input_channels=config["in_channels"],
            output_channels=config["in_channels"],
            size_requirements=SizeRequirements(multiple_of=STRIDE),
            # The attention runs over channels: what it weighs them by is summed over all pixels of what it is shown.
            tiling=ModelTiling.DISCOURAGED,
        )


def _is_mirage(state_dict: StateDict) -> bool:
    """Whether there are gated CNNs (``encoder_level1.0.attn.gatedcnn.gic1.weight``) among the weights of such a
    network, which may be behind prefixes and beside other weights, as the released code's training writes them."""
    return any(is_mirage(network.state) for network in find_networks(state_dict))
