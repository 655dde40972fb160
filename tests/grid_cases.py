"""Trainers of groups that take no time, which processes of their own can import."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

COSTS = {"a+b": 0.2, "c+d": 0.3}  # dB; any other group of several costs 3


@dataclass(frozen=True)
class FakeTrain:
    """Writes a file; notes each training by a file of its own in ``journal``.

    Args:
        wait: seconds that a training takes.
        fails: names of groups whose training fails.
        kills: names of groups whose first training ends its process.
    """

    journal: str
    wait: float = 0.0
    fails: tuple[str, ...] = ()
    kills: tuple[str, ...] = ()
    settings: int = 0

    @property
    def identity(self):
        return {"settings": self.settings, "deep": {"er": [1, 2]}}

    def __call__(self, group, folder, weights):
        name = "+".join(group)
        folder.mkdir(parents=True, exist_ok=True)
        first = not (folder / "begun").exists()
        (folder / "begun").touch()
        (Path(self.journal) / f"{name}-{os.getpid()}-{time.monotonic_ns()}").touch()
        if name in self.kills and first:
            os.kill(os.getpid(), signal.SIGKILL)
        end = time.monotonic() + self.wait
        while time.monotonic() < end:
            time.sleep(0.01)
        if name in self.fails:
            raise FloatingPointError("step 3: not finite: loss nan")
        weights.write_bytes(b"weights")


@dataclass(frozen=True)
class FakeMeasure:
    value: float = 30.0

    @property
    def identity(self):
        return {"value": self.value}

    def __call__(self, weights, group):
        assert weights.read_bytes() == b"weights"
        cost = 0.0 if len(group) == 1 else COSTS.get("+".join(group), 3.0)
        return {name: [self.value - cost - 1, self.value - cost + 1] for name in group}


def trainings(journal):
    """Groups that were trained, as often as they were."""
    return sorted(path.name.split("-")[0] for path in Path(journal).iterdir())
