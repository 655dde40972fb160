"""Samples that were taken before, handed to pytest-benchmark: its own loop would time one function to the end before
the next, with the host's clock."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class Clock:
    """A clock that stands still but for `advance`: it hands samples that were taken before to pytest-benchmark."""

    def __init__(self) -> None:
        self.now = 0.0
        self.samples: Iterator[float] = iter(())

    def read(self) -> float:
        return self.now

    def advance(self) -> None:
        self.now += next(self.samples)


CLOCK = Clock()


def replay(benchmark: Any, samples: list[float]) -> None:
    CLOCK.samples = iter(samples)
    benchmark.pedantic(CLOCK.advance, rounds=len(samples))
