"""Measure on this machine's CPU which instruction set is faster: ``mirage tune --device cpu``.

The C++ kernels settle on an instruction set when the first of them runs, so each has a process of its own (``python -m
mirage.tune_cpu``). These take turns: round by round a pass of each case on each instruction set, so that what else the
machine does meets all of them. A process waits on its pipe while another has its turn. Messages are lines of JSON.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import astuple, dataclass
from typing import Any

import torch

import mirage_kernels
from mirage.tune import BETTER, NETWORKS, training_step
from mirage.wording import counted
from mirage_kernels._runtime import dispatch, instruction_set, tuning
from mirage_kernels._runtime.processor import cpu_name
from mirage_kernels._runtime.tuning import INSTRUCTION_SETS, CpuTuning

__all__ = ["ROUNDS", "Case", "Found", "by_built_in", "choose", "instruction_sets", "slower_than_float32", "tune_cpu"]

ROUNDS = 7
WITHOUT = (instruction_set.VARIABLE, tuning.VARIABLE, "MIRAGE_KERNELS")
"""Settings that would change what runs."""


@dataclass(frozen=True)
class Case:
    """What is timed: a pass of a network.

    Attributes:
        shape: [B, C, H, W] of the images.
        dtype: of weights and images, such as ``bfloat16``; of autocast in a training step.
        step: a training step, forward and backward.
    """

    shape: tuple[int, int, int, int]
    dtype: str
    step: bool = False

    def __str__(self) -> str:
        return f"{self.shape[2]}x{self.shape[3]} {self.dtype}{' step' if self.step else ''}"


Times = Mapping[Case, Mapping[str, float]]
"""Milliseconds by case and instruction set."""


@dataclass(frozen=True)
class Found:
    """What was measured, and what it says.

    Attributes:
        tuning: what to save.
        built_in: the instruction set that runs by itself.
        times: medians of the rounds.
    """

    tuning: CpuTuning
    built_in: str
    times: Times


def tune_cpu(
    variant: str,
    shapes: Sequence[tuple[int, int, int, int]],
    dtypes: Sequence[str],
    step: bool = False,
    rounds: int = ROUNDS,
    on_step: Callable[[str], object] = lambda message: None,
) -> Found:
    """Time a network on every instruction set that this machine and the C++ library have.

    Args:
        variant: ``"tiny"`` or ``"small"``.
        shapes: [B, C, H, W] of the images.
        dtypes: their names, such as ``"bfloat16"``: of weights and images in inference; of autocast in training steps.
        step: training steps too.
        rounds: turns of each instruction set.
        on_step: called with a line about what is done next.

    Raises:
        RuntimeError: there is no C++ library, or a process that measures ended.
        ValueError: `rounds` is below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    sets, built_in = instruction_sets()
    steps = (False, True) if step else (False,)
    cases = [Case(shape, dtype, with_step) for with_step, shape, dtype in itertools.product(steps, shapes, dtypes)]
    with ExitStack() as stack:
        workers = {}
        for isa in sets:
            workers[isa] = _Worker(isa, variant, cases)
            stack.callback(workers[isa].close)
        for worker in workers.values():
            worker.await_start()
        turns: list[list[dict[str, float]]] = []
        for i in range(rounds):
            on_step(f"round {i + 1} of {rounds}: {counted(len(cases), 'case')} on {', '.join(sets)}")
            turns.append([{isa: worker.milliseconds(j) for isa, worker in workers.items()} for j in range(len(cases))])
    times = {
        case: {isa: statistics.median(turn[i][isa] for turn in turns) for isa in sets} for i, case in enumerate(cases)
    }
    return Found(CpuTuning(cpu_name(), choose(times, built_in)), built_in, times)


def instruction_sets() -> tuple[tuple[str, ...], str]:
    """Those to compare, the lowest first, and the one that runs by itself. The baseline is compared with nothing: every
    other is faster.

    Raises:
        RuntimeError: there is no C++ library, with the reason.
    """
    native = dispatch.native
    if native is None:
        raise RuntimeError(f"the C++ library is {mirage_kernels.available()['cpp']}")
    above = tuple(isa for isa in INSTRUCTION_SETS[1:] if not native.cpu_isa_problem(isa))
    return above or INSTRUCTION_SETS[:1], native.built_in_cpu_isa()


def by_built_in(times: Times, built_in: str) -> dict[str, float]:
    """The time of each instruction set by the built-in one's: the geometric mean over the cases."""
    sets = next(iter(times.values()))
    return {
        isa: statistics.geometric_mean(of_case[isa] / of_case[built_in] for of_case in times.values()) for isa in sets
    }


def choose(times: Times, built_in: str) -> str:
    """The instruction set that takes the least time, where that is at most `BETTER` of the built-in one's."""
    shares = by_built_in(times, built_in)
    best = min(shares, key=shares.__getitem__)
    return best if shares[best] <= BETTER else built_in


def slower_than_float32(times: Times, isa: str) -> dict[Case, float]:
    """The cases of other dtypes that take clearly longer than float32 on this instruction set, and how many times its
    time."""
    found = {}
    for case, of_case in times.items():
        single = times.get(Case(case.shape, "float32", case.step))
        if single is not None and single[isa] <= BETTER * of_case[isa]:
            found[case] = of_case[isa] / single[isa]
    return found


class _Worker:
    """A process that measures on one instruction set."""

    def __init__(self, isa: str, variant: str, cases: Sequence[Case]) -> None:
        self._isa = isa
        request = {"variant": variant, "cases": list(map(astuple, cases)), "threads": torch.get_num_threads()}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mirage.tune_cpu", json.dumps(request)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={k: v for k, v in os.environ.items() if k not in WITHOUT} | {instruction_set.VARIABLE: isa},
        )

    def milliseconds(self, case: int) -> float:
        """Take a turn: a pass of the case of this number."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # which has no answer
            print(case, file=self._process.stdin, flush=True)
        return float(self._answer())

    def await_start(self) -> None:
        """Wait until the process has the library, on the right instruction set."""
        if (active := self._answer()) != self._isa:
            raise RuntimeError(f"the process that measures {self._isa} runs {active}")

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process that measures {self._isa} ended with status {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self._process.kill()
        with suppress(BrokenPipeError):
            self._process.communicate()


def _call(variant: str, case: Case) -> Callable[[], object]:
    """What is timed: one pass, or one training step."""
    torch.manual_seed(0)
    model, image, dtype = NETWORKS[variant](), torch.rand(case.shape), getattr(torch, case.dtype)
    if case.step:
        model.train()

        def step() -> None:
            model.zero_grad()
            training_step(model, image, dtype)

        return step
    model, image = model.eval().to(dtype), image.to(dtype)

    @torch.inference_mode()
    def run() -> object:
        return model(image)

    return run


def _turn(call: Callable[[], object]) -> float:
    """Milliseconds of a call after another, which finds the caches full of another process's data and its memory given
    back."""
    call()
    start = time.perf_counter()
    call()
    elapsed = time.perf_counter() - start
    mirage_kernels.release_workspace()
    return elapsed * 1e3


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asks ends this one
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed must not end up among the answers
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    print(json.dumps(dispatch.native.cpu_isa()), file=answers, flush=True)
    calls: dict[int, Callable[[], object]] = {}
    for line in sys.stdin:
        i = int(line)
        if i not in calls:
            shape, dtype, step = request["cases"][i]
            calls[i] = _call(request["variant"], Case(tuple(shape), dtype, step))
        print(json.dumps(_turn(calls[i])), file=answers, flush=True)


if __name__ == "__main__":
    _main()
