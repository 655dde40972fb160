"""A training run: the loop over Lightning Fabric, which places, wraps and synchronises; what is trained is all here."""

from __future__ import annotations

import copy
import itertools
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mirage.checkpoint import CheckpointError, load_into
from mirage.train.build import build_average, build_loss, build_network, build_optimizer, check_scale
from mirage.train.config import Config, as_dict, changes
from mirage.train.contrast import gather_embeddings
from mirage.train.data import TrainingSet, ValidationSet, batches
from mirage.train.limits import check_numbers
from mirage.train.logs import Logs
from mirage.train.schedule import Rates
from mirage.train.state import State, newest_state, read_state, write_state

__all__ = ["Interrupted", "Run"]


class Interrupted(Exception):
    """The run was told to stop (SIGINT or SIGTERM), and has written a checkpoint."""


class Run:
    """Network, average, optimizer and data of a training, begun or resumed; `train` goes on with it.

    Args:
        config: as `mirage.train.load_config` gives it.
        fabric: Lightning's; made from the configuration if left out.

    Attributes:
        network: the network that trains, without wrappers.
        average: its average (``torch.optim.swa_utils.AveragedModel``), or None.
        step: optimizer steps done.
        samples: samples seen by all processes together.
        resumed: the checkpoint that it goes on from, or None.
        changes: where the configuration differs from that checkpoint's.

    Raises:
        ConfigError, FileNotFoundError: the configuration, or what it names.
        CheckpointError: a checkpoint is damaged or of another network.
    """

    def __init__(self, config: Config, fabric: Any = None) -> None:
        check_numbers(config)
        self.config = config
        if config.trainer.threads:
            torch.set_num_threads(config.trainer.threads)
        self.fabric = _fabric(config) if fabric is None else fabric
        self.data = self.make_data()
        self.validation = ValidationSet(config.data, self.data.held_out, config.seed)
        self.rates = Rates(config.schedule, config.optimizer.lr, self.data.epoch / config.data.batch)
        self.loss: Any = self.make_loss()
        torch.manual_seed(config.seed)
        network = self.make_network()
        check_scale(config, network)
        self.model, self.optimizer = self.fabric.setup(network, build_optimizer(config, network))
        self.network: nn.Module = network
        self.average = None if config.trainer.ema is None else build_average(network, config.trainer.ema)
        self.step = self.samples = 0
        self.seconds = 0.0
        self.changes: list[str] = []
        self.resumed = self._resume()
        self.logs = Logs(Path(config.output.folder), self.step, config.output.tensorboard) if self._writes else None

    @property
    def _writes(self) -> bool:
        return self.fabric.global_rank == 0

    # --- what runs of another kind have in the place of the configuration's

    def make_data(self) -> TrainingSet:
        """What is trained on."""
        return TrainingSet(self.config.data, self.config.seed)

    def make_loss(self) -> Any:
        """The loss."""
        return build_loss(self.config)

    def make_network(self) -> nn.Module:
        """The network with the weights that training starts from; checkpoints hold its state dict."""
        return build_network(self.config)

    # --- checkpoints

    def state(self) -> State:
        """Everything that going on needs, not copied."""
        scaler = _scaler(self.fabric)
        return State(
            step=self.step,
            samples=self.samples,
            seconds=self.seconds,
            network=self.network.state_dict(),
            average={} if self.average is None else self.average.module.state_dict(),
            optimizer=_plain(self.optimizer).state_dict(),
            config=as_dict(self.config),
            arguments=dict(getattr(self.network, "config", {})),
            epoch=self.samples // self.data.epoch,
            scaler=scaler.state_dict() if scaler else {},
        )

    def save(self) -> None:
        """Write a checkpoint; every process calls it."""
        if self._writes:
            write_state(self.state(), self.config.output.folder, self.config.output.keep)
        self.fabric.barrier()

    def load(self, state: State, path: Path) -> None:
        """Take over a checkpoint's state.

        Raises:
            CheckpointError: it is of another network, or its optimizer's state is.
        """
        load_into(self.network, state.network, path)
        if self.average is not None:
            self.average.module.load_state_dict(state.average or state.network)
            self.average.n_averaged.fill_(state.step if state.average else 0)
        try:
            _plain(self.optimizer).load_state_dict(_for_these_weights(state, self.network))
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{path}: the optimizer's state is of other weights. {error}") from error
        scaler = _scaler(self.fabric)
        if scaler is not None and state.scaler:
            scaler.load_state_dict(state.scaler)
        self.step, self.seconds = state.step, state.seconds
        self.samples = state.step * self.config.data.batch if state.samples is None else state.samples

    def _resume(self) -> Path | None:
        where = self.config.trainer.resume
        found = newest_state(self.config.output.folder) if where is None else (Path(where), read_state(where))
        if found is None:
            return None
        path, state = found
        self.load(state, path)
        self.changes = changes(state.config, as_dict(self.config)) if state.config else []
        return path

    # --- training

    def train(self) -> None:
        """Train to the end of the schedule, writing checkpoints and logs on the way.

        Raises:
            FloatingPointError: the loss or a gradient is not finite, and the configuration says to stop.
            Interrupted: SIGINT or SIGTERM came; the state is saved.
        """
        c, steps = self.config, self.rates.steps
        passes = c.trainer.accumulate
        todo = max(0, steps - self.step)
        stream = batches(self.data, self.samples, todo, passes, self.fabric.global_rank, self.fabric.world_size)
        self.model.train()
        clock = _Clock(self.seconds)
        meter = _Meter()
        saved_step, saved_at = self.step, time.monotonic()
        with _signals() as stop:
            while self.step < steps:
                meter.add(self._step(list(itertools.islice(stream, passes))))
                self.seconds = clock.seconds()
                if self.step % c.output.log_steps == 0:
                    means = self._average_over_processes(meter.means())
                    self._log("train", {**means, "lr": self.rates.at(self.step - 1), "seconds": self.seconds})
                if self.step % c.output.validate_steps == 0 or self.step == steps:
                    self.validate()
                minutes = (time.monotonic() - saved_at) / 60
                due = bool(c.output.checkpoint_steps) and self.step % (c.output.checkpoint_steps or 1) == 0
                due = due or bool(c.output.checkpoint_minutes) and minutes >= (c.output.checkpoint_minutes or 0)
                stopping, due = self._agree(bool(stop), due)
                if due or stopping:
                    self.save()
                    saved_step, saved_at = self.step, time.monotonic()
                if stopping:
                    raise Interrupted(f"stopped at step {self.step}, which is saved in {c.output.folder}")
        if saved_step != self.step:
            self.save()

    def _step(self, parts: list[Any]) -> dict[str, float]:
        """One optimizer step over the batches of its passes.

        Returns:
            The loss, its terms and the gradient's norm; nothing where the step was left out.
        """
        c = self.config
        torch.manual_seed(_step_seed(c.seed, self.step, self.fabric.global_rank))  # stochastic depth
        for group in self.optimizer.param_groups:
            group["lr"] = self.rates.at(self.step)
        kept = [b.clone() for b in self.network.buffers()] if c.trainer.on_nan == "skip" else []
        values: dict[str, float] = {}
        for number, (degraded, clean, _) in enumerate(parts):
            with self.fabric.no_backward_sync(self.model, enabled=number < len(parts) - 1):
                loss, terms = self._loss(self.fabric.to_device(degraded), self.fabric.to_device(clean))
                self.fabric.backward(loss / len(parts))
            for name, value in {"loss": loss, **terms._asdict()}.items():
                values[name] = values.get(name, 0.0) + value.item() / len(parts)
        norm = self.fabric.clip_gradients(
            self.model, self.optimizer, max_norm=c.optimizer.clip or float("inf"), error_if_nonfinite=False
        )
        # Loss scaling of 16-bit floats tries scales that overflow, and leaves such steps out itself.
        overflow = not bool(torch.isfinite(norm))
        own = not all(map(_finite, values.values()))
        anywhere, left_out = self._agree(own, own or (overflow and _scaler(self.fabric) is None))
        if left_out:
            where = " (of another process)" if anywhere and not own else ""
            self._not_finite(parts, where, {**values, "gradient": float(norm)}, kept)
        else:
            self.optimizer.step()
            if self.average is not None:
                self.average.update_parameters(self.network)
        self.optimizer.zero_grad()
        self.step += 1
        self.samples += c.data.batch
        return {} if left_out or overflow else {**values, "gradient": float(norm)}

    def _loss(self, degraded: Tensor, clean: Tensor) -> tuple[Tensor, Any]:
        if self.loss.contrastive_weight == 0:
            return self.loss(self.model(degraded), clean)
        restored, embeddings = self.model(degraded, return_spd=True)
        z_s, z_l = (gather_embeddings(z, self.fabric) for z in embeddings)
        return self.loss((restored, (z_s, z_l)), clean)

    def _not_finite(self, parts: list[Any], where: str, values: dict[str, float], buffers: list[Tensor]) -> None:
        """Stop, or leave the weights and statistics as they were; either way say which pictures were in the batch."""
        names = [name for _, _, batch in parts for name in batch]
        found = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        message = f"step {self.step}: not finite{where}: {found}. The batch: {', '.join(names)}"
        if self.config.trainer.on_nan == "stop":
            raise FloatingPointError(message)
        print(f"skipped {message}", flush=True)
        with torch.no_grad():
            for buffer, before in zip(self.network.buffers(), buffers, strict=True):
                buffer.copy_(before)

    def _agree(self, *flags: bool) -> tuple[bool, ...]:
        """Whether any process says so, of each flag."""
        if self.fabric.world_size == 1:
            return flags
        mine = torch.tensor([float(flag) for flag in flags], device=self.fabric.device)
        return tuple(bool(value > 0) for value in self.fabric.all_reduce(mine, reduce_op="sum"))

    # --- what is told

    def _average_over_processes(self, means: dict[str, float]) -> dict[str, float]:
        if self.fabric.world_size == 1 or not means:  # nothing on one process is nothing on all
            return means
        mine = torch.tensor(list(means.values()), dtype=torch.float32, device=self.fabric.device)
        return dict(zip(means, self.fabric.all_reduce(mine, reduce_op="mean").tolist(), strict=True))

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean PSNR in dB of the validation pictures, clipped to [0, 1], by set and noise, on the first process.

        ``"denoise_25"`` is of the present weights, ``"denoise_25_ema"`` of the averaged ones.
        """
        found: dict[str, float] = {}
        if self._writes and len(self.validation):
            self.network.eval()
            for suffix, network in (("", self.network), ("_ema", self.average and self.average.module)):
                if network is not None:
                    found |= {name + suffix: value for name, value in self._psnr(network.eval()).items()}
            self.network.train()
            self._log("validation", {**found, "seconds": self.seconds})
        self.fabric.barrier()
        return found

    def _psnr(self, network: nn.Module) -> dict[str, float]:
        values: dict[str, list[float]] = {}
        for measure, (degraded, clean, _) in self.validation:
            restored = network(self.fabric.to_device(degraded[None]))[0].float().clamp(0, 1).cpu()
            error = (restored - clean).double().square().mean()
            values.setdefault(measure, []).append(-10 * torch.log10(error).item())
        return {measure: sum(each) / len(each) for measure, each in values.items()}

    def _log(self, kind: str, values: dict[str, Any]) -> None:
        if self.logs is not None:
            print(self.logs.write(kind, self.step, values), flush=True)


class _Clock:
    """Seconds of training, counted on from those of earlier runs."""

    def __init__(self, before: float) -> None:
        self.start = time.monotonic() - before

    def seconds(self) -> float:
        return round(time.monotonic() - self.start, 1)


class _Meter:
    """Means over the steps since the last log, without those that were left out."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.count = 0

    def add(self, values: dict[str, float]) -> None:
        self.count += bool(values)
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        means = {name: value / self.count for name, value in self.sums.items()}
        self.sums, self.count = {}, 0
        return means


def _fabric(config: Config) -> Any:
    from lightning_fabric import Fabric

    t = config.trainer
    precision: Any = t.precision
    fabric = Fabric(
        accelerator=t.accelerator, devices=t.devices, num_nodes=t.nodes, strategy=t.strategy, precision=precision
    )
    fabric.launch()
    return fabric


def _plain(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)


def _scaler(fabric: Any) -> Any:
    """What scales the loss of 16-bit floats, or None."""
    return getattr(getattr(fabric.strategy, "precision", None), "scaler", None)


def _for_these_weights(state: State, network: nn.Module) -> dict[str, Any]:
    """The optimizer's state, of a file whose optimizer had all weights, for those that train here."""
    content = copy.copy(state.optimizer)
    everything = list(network.parameters())
    trained = [i for i, weight in enumerate(everything) if weight.requires_grad]
    numbers = [number for group in content["param_groups"] for number in group["params"]]
    if len(numbers) == len(everything) > len(trained):
        content["state"] = {new: content["state"][old] for new, old in enumerate(trained) if old in content["state"]}
        content["param_groups"] = [{**content["param_groups"][0], "params": list(range(len(trained)))}]
    return content


def _step_seed(seed: int, step: int, rank: int) -> int:
    """A seed for one step of one process; steps and ranks do not share theirs."""
    import numpy as np

    return int(np.random.SeedSequence([seed, 2, step, rank]).generate_state(1, np.uint64)[0] >> 1)


def _finite(value: float) -> bool:
    return abs(value) < float("inf")


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The first SIGINT or SIGTERM goes to the list; a second SIGINT ends the process as usual."""
    received: list[int] = []

    def note(number: int, _: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread, where signals are not ours
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
