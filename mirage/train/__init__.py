"""Training over Lightning Fabric: ``mirage train 3deg-tiny data.root=/datasets``.

    from mirage.train import Run, load_config

    run = Run(load_config("3deg-tiny", ["data.root=/datasets", "output.folder=runs/mine"]))
    run.train()

Fabric is the engine: devices, processes, precision, synchronised gradients. The loop is in `mirage.train.run`, since a
run must go on bit for bit where it stopped, on any number of processes, and its checkpoints are those of the
released code's Trainer. What to train on what is a YAML file (`mirage.train.config`).
"""

from mirage.train.ablations import ABLATIONS
from mirage.train.build import build_loss, build_network
from mirage.train.config import Config, ConfigError, load_config
from mirage.train.export import export_weights
from mirage.train.run import Interrupted, Run
from mirage.train.state import State, read_state

__all__ = [
    "ABLATIONS",
    "Config",
    "ConfigError",
    "Interrupted",
    "Run",
    "State",
    "build_loss",
    "build_network",
    "export_weights",
    "load_config",
    "read_state",
]
