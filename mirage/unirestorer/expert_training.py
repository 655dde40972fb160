"""An expert for each node of a tree, trained by `mirage.train` on the node's samples: whole, or as what it adds to the
root's by LoRA.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from mirage.grids.settings import keep_settings
from mirage.grids.trained import TrainingFailed
from mirage.grids.training import config_identity
from mirage.grids.workers import Workers
from mirage.train.build import build_network
from mirage.train.config import Config, Model
from mirage.train.run import Run
from mirage.unirestorer.lora import LoRASettings, add_lora
from mirage.unirestorer.lora_files import save_lora
from mirage.unirestorer.samples import MemberSet, one_set_a_kind
from mirage.unirestorer.tree import ExpertTree

__all__ = ["ExpertRun", "ExpertTrainings", "TrainExpert", "expert_file", "parse_steps"]

FORMAT = "mirage unirestorer trainings, version 1"


def expert_file(folder: Path, node: int) -> Path:
    """Where the weights of a node's expert lie in the folder of experts."""
    return folder / f"{node:03d}.safetensors"


def parse_steps(text: str) -> tuple[int, ...]:
    """``level_steps`` of text such as ``"16000 6000 2000"``.

    Raises:
        ValueError: a word is no positive integer.
    """
    words = text.replace(",", " ").split()
    if not words or not all(word.isdecimal() and int(word) for word in words):
        raise ValueError(f"level_steps: expected a positive integer for each level, such as 16000 2000, got {text!r}")
    return tuple(int(word) for word in words)


class ExpertRun(Run):
    """A run of `mirage.train` on some samples of its configuration.

    Args:
        config: of the run; ``model.weights`` are the base's where there is LoRA.
        members: numbers of the samples.
        lora: what is trained in the place of the weights; None: the weights.
        fabric: as of `mirage.train.Run`.
    """

    def __init__(
        self, config: Config, members: Sequence[int], lora: LoRASettings | None = None, fabric: Any = None
    ) -> None:
        self.members, self.lora = members, lora
        super().__init__(config, fabric)

    def make_data(self) -> MemberSet:
        return MemberSet(one_set_a_kind(self.config.data), self.config.seed, self.members)

    def make_network(self) -> nn.Module:
        network = build_network(self.config)
        return (
            network if self.lora is None else add_lora(network, self.lora.rank, self.lora.alpha, norms=self.lora.norms)
        )


@dataclass(frozen=True)
class TrainExpert:
    """Trains the expert of a node.

    Args:
        config: of `mirage.train`: its network, optimizer, schedule and data, of which the tree's members are samples.
        lora: what is trained of all but the root's; None: each node has a network of its own.
        dtype: of whole weights that are kept.
        level_steps: optimizer steps of an expert of each level, from the root on; None: as ``config`` has it, for all.
        models: by node, networks of their own in the place of ``config.model``: another kind, or other arguments. Such
            a node is trained whole, also where others are by LoRA; of the root, LoRA adds to it.

    Raises:
        ValueError: ``level_steps`` are not positive integers.
    """

    config: Config
    lora: LoRASettings | None = None
    dtype: str = "float32"
    level_steps: tuple[int, ...] | None = None
    models: Mapping[int, Model] = field(default_factory=dict)

    def __post_init__(self) -> None:
        steps = self.level_steps
        if steps is not None and (not steps or any(type(count) is not int or count < 1 for count in steps)):
            raise ValueError(f"level_steps: expected a positive integer for each level, got {steps!r}")

    def steps(self, level: int) -> int | None:
        """Optimizer steps of an expert of a level, where they are said in steps."""
        return self.config.schedule.steps if self.level_steps is None else self.level_steps[level]

    def lora_of(self, node: int) -> LoRASettings | None:
        """What is trained in the place of a node's weights; None: the weights."""
        return self.lora if node and node not in self.models else None

    def config_of(self, level: int, folder: Path, node: int = 0) -> Config:
        """The configuration of an expert, which writes to a folder."""
        model = self.models.get(0 if self.lora_of(node) else node, self.config.model)
        schedule = self.config.schedule
        if self.level_steps is not None:
            schedule = dataclasses.replace(schedule, steps=self.level_steps[level], epochs=None)
        output = dataclasses.replace(self.config.output, folder=str(folder))
        return dataclasses.replace(self.config, model=model, schedule=schedule, output=output)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the experts, as JSON has it."""
        config = dataclasses.replace(self.config, data=one_set_a_kind(self.config.data))
        lora = None if self.lora is None else dataclasses.asdict(self.lora)
        # Only where there are some: folders of before there were any stay what they are.
        steps = {} if self.level_steps is None else {"level_steps": list(self.level_steps)}
        models = {str(node): dataclasses.asdict(model) for node, model in sorted(self.models.items())}
        own = {"models": models} if models else {}
        return {"dtype": self.dtype, **config_identity(config), "lora": lora, **steps, **own}

    def __call__(self, node: int, members: Sequence[int], folder: Path, level: int = 0) -> None:
        """Train, going on from a checkpoint of an earlier run, and write the weights; checkpoints are removed then.

        Args:
            node: its number; 0 is the root, which has to be there before experts by LoRA.
            members: numbers of its samples.
            folder: of all experts.
            level: of the node, which ``level_steps`` go by.

        Raises:
            mirage.train.Interrupted: it was told to stop; a checkpoint is written.
            FileNotFoundError: there is no root.
            FloatingPointError, ValueError, OSError: as `mirage.train.Run`.
        """
        from mirage.train import export_weights
        from mirage.train.state import checkpoints

        run_folder = folder / f"{node:03d}"
        run_folder.mkdir(parents=True, exist_ok=True)
        lora = self.lora_of(node)
        config = self.config_of(level, run_folder, node)
        if lora is not None:
            base = expert_file(folder, 0)
            if not base.is_file():
                raise FileNotFoundError(f"no root at {str(base)!r}, which expert {node} adds to; train node 0 first")
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, weights=str(base), key=None))
        with open(run_folder / "log.txt", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
            run = ExpertRun(config, members, lora)
            run.train()
        if lora is None:
            export_weights(run_folder, expert_file(folder, node), dtype=self.dtype)
        else:
            network = run.network if run.average is None else run.average.module
            save_lora(network, expert_file(folder, node))
        for file in checkpoints(run_folder):
            file.unlink()


class ExpertTrainings:
    """The trainings of a tree's experts, kept in a folder: ``NNN.safetensors`` for each node, ``NNN/`` its run.

    No expert is trained twice: a lock keeps other processes and machines off one that is being trained, and what a
    process that was killed had reached is gone on from.

    Args:
        folder: of everything; machines of a cluster all reach it.
        tree: whose members are samples of ``train.config``.
        train: how.
        workers: how many at a time, and where.
        on_begin, on_done: called with the name of each expert (``"003"``) that is to be trained or waited for, and
            when it is done.

    Raises:
        ValueError: the folder holds trainings of other settings or of another tree, or there are steps for more or
            fewer levels than the tree has, or networks for nodes that it does not have; the message says which.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        tree: ExpertTree,
        train: TrainExpert,
        *,
        workers: Workers | int | None = None,
        on_begin: Callable[[str], None] | None = None,
        on_done: Callable[[str], None] | None = None,
    ) -> None:
        self.folder, self.tree, self.train = Path(folder), tree, train
        self.workers = workers if isinstance(workers, Workers) else Workers(workers)
        self.on_begin = on_begin or (lambda name: None)
        self.on_done = on_done or (lambda name: None)
        empty = [node.id for node in tree.nodes if not node.size]
        if empty:
            raise ValueError(f"tree: expected samples in every node, got none in {empty[:5]}: was it made by cluster?")
        if train.level_steps is not None and len(train.level_steps) != tree.levels:
            raise ValueError(
                f"level_steps: expected one for each of the tree's {tree.levels} levels, got {list(train.level_steps)}"
            )
        unknown = sorted(node for node in train.models if node not in range(len(tree)))
        if unknown:
            raise ValueError(f"models: expected nodes from 0 to {len(tree) - 1}, got {unknown}")
        keep_settings(self.folder, FORMAT, {"tree": tree.fingerprint, "train": train.identity}, "experts")

    @property
    def missing(self) -> list[int]:
        """Nodes without an expert yet."""
        return [node.id for node in self.tree.nodes if not expert_file(self.folder, node.id).exists()]

    def run(self, nodes: Sequence[int] | None = None) -> list[Path]:
        """Train what is missing, several at a time; where there is LoRA, the root first.

        Args:
            nodes: these alone; None: all.

        Returns:
            The files of their weights.

        Raises:
            TrainingFailed: of one or more experts, after the others are done.
            Stopped: (a KeyboardInterrupt) it was told to stop; what was going on is saved.
        """
        wanted = [node.id for node in self.tree.nodes] if nodes is None else list(nodes)
        todo = [node for node in wanted if node in self.missing]
        if self.train.lora is not None and 0 in self.missing and any(todo):
            self._do([0])
            todo = [node for node in todo if node]
        self._do(todo)
        return [expert_file(self.folder, node) for node in wanted]

    def steps_of(self, name: str) -> int | None:
        """Optimizer steps of an expert's training in all, where they are said in steps."""
        return self.train.steps(self.tree.nodes[int(name)].level)

    def step_of(self, name: str) -> int:
        """The last optimizer step that the trainer of an expert has told."""
        try:
            with open(self.folder / name / "train.csv", "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 1000))
                last = file.read().decode("utf-8", "replace").strip().rpartition("\n")[2]
            return int(last.partition(",")[0])
        except (OSError, ValueError):
            return 0

    def _do(self, nodes: Sequence[int]) -> None:
        if not nodes:
            return
        names = [f"{node:03d}" for node in nodes]
        for name in names:
            self.on_begin(name)
        items = [(node, self.tree.nodes[node].members.tolist(), self.tree.nodes[node].level) for node in nodes]
        failed: dict[str, Exception] = {}
        for number, result in self.workers.run(functools.partial(_train, self.folder, self.train), items):
            if isinstance(result, Exception):
                failed[names[number]] = result
            self.on_done(names[number])
        if failed:
            reasons = "; ".join(f"{name}: {error}" for name, error in failed.items())
            raise TrainingFailed(f"{len(failed)} of {len(nodes)} experts: {reasons}") from next(iter(failed.values()))


def _train(folder: Path, train: TrainExpert, item: tuple[int, list[int], int]) -> bool:
    """One expert, in whichever process; returns whether it was trained here."""
    from filelock import FileLock

    node, members, level = item
    with FileLock(folder / f"{node:03d}.lock"):  # the system opens it when its holder is killed
        if expert_file(folder, node).exists():
            return False
        train(node, members, folder, level)
    return True
