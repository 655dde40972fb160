"""A process of its own for one peer and one problem, and the other end of its pipe.

`Worker(...)` starts ``python -m benchmarks.worker``, which builds the peer, runs it once and keeps what came out; each
`seconds()` then is a turn of timed passes. Between turns the process waits on its pipe, so its thread pool is quiet
while another worker runs. Messages are lines of JSON.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class WorkerError(RuntimeError):
    """A worker ended; the message is the end of what it wrote to standard error."""


def environment(threads: int) -> dict[str, str]:
    """What every measured process runs under: no GPU, the same number of threads in every pool, and this package."""
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT))))
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}


class Worker:
    """A running peer.

    Args:
        peer: its name among the peers of the problem's mode.
        problem: a `peers.Problem`.
        output: file that the outputs of the first pass are written to.

    Raises:
        WorkerError: building it or its first pass failed.
    """

    def __init__(self, peer: str, problem: Any, output: Path) -> None:
        self._log = open(output.with_suffix(".log"), "w+")  # noqa: SIM115
        request = json.dumps({"peer": peer, "problem": asdict(problem), "output": str(output)})
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", request],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment(problem.threads),
        )
        self._answer()

    def seconds(self, at_least: float) -> float:
        """Take a turn of so many seconds; the duration of a pass in it, measured inside the worker. See `turn`."""
        print(at_least, file=self._process.stdin, flush=True)
        return self._answer()["seconds"]

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()
        self._log.close()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._process.wait()
        self._log.seek(0)
        raise WorkerError(f"exit status {self._process.returncode}: {self._log.read()[-2000:]}")


def turn(run: Callable[[], object], at_least: float) -> float:
    """Seconds of a pass: the median of those that begin in the second half of `at_least` seconds.

    The first ones find the caches full of another worker's data, and a virtual machine whose processors slept. Where a
    pass takes longer than half the turn the last one counts.
    """
    begin = time.perf_counter()
    passes: list[tuple[float, float]] = []
    while not passes or passes[-1][0] + passes[-1][1] < at_least:
        start = time.perf_counter() - begin
        result = run()
        passes.append((start, time.perf_counter() - begin - start))
        del result
    return statistics.median([seconds for start, seconds in passes if start >= at_least / 2] or [passes[-1][1]])


def main() -> None:
    import torch

    from benchmarks.peers import Problem, peer_of

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever an engine prints must not end up among the answers
    request = json.loads(sys.argv[1])
    problem = Problem(**{**request["problem"], "shape": tuple(request["problem"]["shape"])})
    torch.set_num_threads(problem.threads)
    runner = peer_of(problem.mode, request["peer"]).build(problem)
    torch.save(runner.outputs(runner.run()), request["output"])
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps({"seconds": turn(runner.run, float(line))}), file=answers, flush=True)


if __name__ == "__main__":
    main()
