"""What the CPU path is meant to reach, beside what the rows of a benchmark run say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.report import Row

NAMES = {"tiny": "MIRAGE-T", "small": "MIRAGE-S"}
FORWARD_MIB = {"tiny": 450, "small": 620}
STEP_MIB = {"tiny": 170, "small": 240}
FASTER = (("eager", "fast", 4.0), ("openvino-f32", "fast", 1.4), ("openvino", "fast-bf16", 1.4))
STEP_FASTER = (("eager", "fast-low", 3.0), ("eager", "fast-fast", 3.0), ("checkpoint", "fast-low", 1.0))


@dataclass(frozen=True)
class Goal:
    """A figure and its bound: `measured` has to be at least it (`at_least`) or at most it."""

    model: str
    what: str
    measured: float
    bound: float
    at_least: bool
    unit: str = ""

    @property
    def reached(self) -> bool:
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound

    def cells(self) -> tuple[str, ...]:
        digits = 0 if self.unit == " MiB" else 2
        asked = f"{'at least' if self.at_least else 'at most'} {self.bound:.{digits}f}{self.unit}"
        return self.model, self.what, asked, f"{self.measured:.{digits}f}{self.unit}", "yes" if self.reached else "no"


def goals(rows: list[Row]) -> list[Goal]:
    """Every goal that has rows, in the order of the file."""
    groups: dict[tuple[str, str, str, str], dict[str, Row]] = {}
    for row in rows:
        if row["test"] in ("test_inference", "test_step", "test_memory"):
            size = "x".join(map(str, row["shape"]))
            groups.setdefault((row["test"], row["mode"], row["variant"], size), {})[row["peer"]] = row
    found: list[Goal] = []
    for (test, mode, variant, size), peers in groups.items():
        if test == "test_memory":
            found += _memory(mode, variant, size, peers)
        else:
            found += _time(mode, variant, size, peers)
    return [*found, *_scaling(rows)]


def _time(mode: str, variant: str, size: str, peers: dict[str, Row]) -> Iterator[Goal]:
    title = "inference" if mode == "inference" else "training step"
    for other, ours, bound in FASTER if mode == "inference" else STEP_FASTER:
        if {other, ours} <= peers.keys():
            what = f"{title} {size}: {peers[ours]['label']} is faster than {peers[other]['label']}"
            yield Goal(NAMES[variant], what, peers[other]["median"] / peers[ours]["median"], bound, True, "x")


def _memory(mode: str, variant: str, size: str, peers: dict[str, Row]) -> Iterator[Goal]:
    name = NAMES[variant]
    if mode == "inference":
        if {"eager", "fast"} <= peers.keys():
            what = f"inference {size}: resident memory of {peers['fast']['label']} over eager's"
            yield Goal(name, what, peers["fast"]["rss_mib"] / peers["eager"]["rss_mib"], 1 / 3, False)
        return
    low, checkpointed = peers.get("fast-low"), peers.get("checkpoint")
    if low is None:
        return
    title, bound = ("forward with autograd", FORWARD_MIB) if mode == "forward" else ("training step", STEP_MIB)
    for key, measure in (("tracker_mib", "tracker"), ("rss_mib", "resident")):
        yield Goal(name, f"{title} {size}: {low['label']}, {measure}", low[key], bound[variant], False, " MiB")
    if checkpointed is not None:
        what = f"{title} {size}: {low['label']} over {checkpointed['label']}, resident"
        yield Goal(name, what, low["rss_mib"] / checkpointed["rss_mib"], 1.0, False)


def _scaling(rows: list[Row]) -> Iterator[Goal]:
    per_pixel: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row["test"] == "test_scaling":
            batch, _, height, width = row["shape"]
            times = per_pixel.setdefault((row["variant"], row["label"]), [])
            times.append(row["median"] / (batch * height * width))
    for (variant, label), times in per_pixel.items():
        if len(times) > 1:
            what = f"{label}: time per pixel, most over least"
            yield Goal(NAMES[variant], what, max(times) / min(times), 1.15, False)
