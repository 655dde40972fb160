"""The networks by name."""

from __future__ import annotations

import inspect
from typing import Any

from mirage.networks.common import RestorationNetwork
from mirage.networks.nafnet import NAFNet
from mirage.networks.promptir import PromptIR
from mirage.networks.restormer import Restormer
from mirage.networks.srresnet import SRResNet

__all__ = ["NETWORKS", "arguments_of", "create", "names"]

NETWORKS: dict[str, type[RestorationNetwork]] = {
    "nafnet": NAFNet,
    "promptir": PromptIR,
    "restormer": Restormer,
    "srresnet": SRResNet,
}


def names() -> list[str]:
    """The names that `create` knows, in alphabetical order."""
    return sorted(NETWORKS)


def arguments_of(name: str) -> list[str]:
    """The arguments that a network takes."""
    return list(inspect.signature(NETWORKS[name].__init__).parameters)[1:]


def create(name: str, **arguments: Any) -> RestorationNetwork:
    """Build a network with random weights, in training mode on the CPU.

    Args:
        name: one of `names`, in whatever case.
        arguments: those of its class, by our names or by those of the published configurations
            (``inp_channels``, ``LayerNorm_type``, ``num_feat``, ...: the ``aliases`` of the class).

    Raises:
        ValueError: there is no network of that name, it has no such argument, or an argument breaks a condition.
    """
    kind = NETWORKS.get(str(name).lower())
    if kind is None:
        raise ValueError(f"name: expected one of {', '.join(names())}, got {name!r}")
    given: dict[str, Any] = {}
    for argument, value in arguments.items():
        ours = kind.aliases.get(argument, argument)
        if ours not in arguments_of(str(name).lower()):
            known = ", ".join(arguments_of(str(name).lower()))
            raise ValueError(f"{name} has no argument {argument!r}; there are: {known}")
        if ours in given:
            raise ValueError(f"{ours}: given twice, also as {argument!r}")
        given[ours] = value
    return kind(**given)
