"""From a configuration to the network, its loss and its optimizer."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import mirage
from mirage.losses import MirageLoss
from mirage.train.ablations import ablate, find_ablation
from mirage.train.config import Config, ConfigError

__all__ = ["build_average", "build_loss", "build_network", "build_optimizer", "check_scale"]

SPD_HEAD = ("reduce_shallow", "reduce_latent", "spd_proj_shallow", "spd_proj_latent")


def build_network(config: Config) -> nn.Module:
    """The network with the weights that training starts from, drawn from PyTorch's default generator or read.

    The SPD head's weights do not train where the loss does not use them: they then take no part in DDP's and the
    optimizer's work, and keep their values in checkpoints.

    Raises:
        ConfigError: arguments that the network refuses, or an unknown ablation.
        FileNotFoundError, CheckpointError: of ``model.weights``.
    """
    m = config.model
    if m.network != "mirage":
        return _build_other(config)
    make = {"tiny": mirage.mirage_tiny, "small": mirage.mirage_small}[m.size]
    ablation = find_ablation(m.ablation)
    try:
        network: nn.Module = make(**{"drop_path": m.drop_path, "spd": m.spd and ablation.spd, **m.arguments})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model: {error}") from error
    ablate(network, ablation)
    if m.weights is not None:
        mirage.load_checkpoint(m.weights, network, key=m.key)
    if build_loss(config).contrastive_weight == 0:
        for name in SPD_HEAD:
            if hasattr(network, name):
                getattr(network, name).requires_grad_(False)
    if config.trainer.sync_batchnorm:
        if m.fast:
            raise ConfigError(
                "trainer.sync_batchnorm: fast modules take statistics of one device; set model.fast=false"
            )
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return mirage.fast.accelerate(network, m.memory) if m.fast else network


def _build_other(config: Config) -> nn.Module:
    """One of `mirage.networks`, as `build_network` does it. Weights that nothing uses do not train."""
    from mirage import networks

    m = config.model
    try:
        network = networks.create(m.network, **m.arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.arguments: {error}") from error
    for name, side in (("data.crop", config.data.crop), ("data.validation_crop", config.data.validation_crop)):
        if side % network.scale:
            raise ConfigError(f"{name}: expected a multiple of the network's scale {network.scale}, got {side}")
    if m.weights is not None:
        mirage.load_checkpoint(m.weights, network, key=m.key)
    for name, parameter in network.named_parameters():
        if name.startswith(network.unused):
            parameter.requires_grad_(False)
    if m.fast:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of networks with nothing to be made faster
            mirage.fast.accelerate(network, m.memory)
    return network


def check_scale(config: Config, network: nn.Module) -> None:
    """Refuse a network whose output is not as large as the sets' clean pictures are.

    Raises:
        ConfigError: it is not.
    """
    sets, scale = config.data.sets[0].scale, getattr(network, "scale", 1)
    if sets != scale:
        raise ConfigError(
            f"data.sets[0].scale: expected {scale}, as the network enlarges ({type(network).__name__}), got {sets}"
        )


def build_loss(config: Config) -> MirageLoss:
    """The loss, without its contrastive term where there is no SPD head."""
    ablation = find_ablation(config.model.ablation)
    spd = config.model.network == "mirage" and config.model.spd and ablation.spd
    return MirageLoss(
        config.loss.preset,
        fourier_weight=config.loss.fourier_weight if ablation.fourier else 0.0,
        contrastive_weight=config.loss.contrastive_weight if spd else 0.0,
        temperature=config.loss.temperature,
    )


def build_optimizer(config: Config, network: nn.Module) -> torch.optim.Optimizer:
    """Adam or AdamW over the weights that train, in the order of ``network.parameters()``."""
    o = config.optimizer
    options: dict[str, Any] = {} if o.weight_decay is None else {"weight_decay": o.weight_decay}
    options["fused"] = config.trainer.precision != "16-mixed"  # whose scaler and clipping need the plain one
    cls = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[o.name]
    weights = [p for p in network.parameters() if p.requires_grad]
    return cls(weights, lr=o.lr, betas=(o.betas[0], o.betas[1]), **options)


def build_average(network: nn.Module, decay: float) -> AveragedModel:
    """The exponential average of weights and of batch norm's running statistics.

    The decay begins at 2/11 and reaches its value as ``(1 + n) / (10 + n)`` does, so that early averages forget the
    random weights that training starts from.
    """

    def update(averages: Any, values: Any, count: Any) -> None:
        if not averages[0].is_floating_point():
            torch._foreach_copy_(averages, values)
            return
        n = float(count) + 1
        torch._foreach_lerp_(averages, values, 1 - min(decay, (1 + n) / (10 + n)))

    return AveragedModel(network, multi_avg_fn=update, use_buffers=True)
