"""Peak memory of one pass in this process, as JSON: ``python -m benchmarks.peak_memory --peer fast-low --mode step``.

Meant for a fresh process per measurement. The process imports and builds everything, then the peak of its resident
memory is reset and one pass runs. ``rss_mib`` is how far the peak rose above the memory resident before: it counts
everything that the pass touched for the first time, native workspaces, generated code and thread stacks included, and
neither weights nor images, which were there before. ``code_mib`` is the part of it that is pages of files: the code of
the libraries, which every first pass reads. ``tracker_mib`` counts as `mirage.complexity` does: the storages
that PyTorch sees, weights and images included; it is null for engines that are not PyTorch. ``built_mib`` is what
building the peer added before the pass, weights, images and its own libraries included: some engines allocate there
what others allocate in the first pass.

The peak is VmHWM of /proc/self/status, which is what `ru_maxrss` reports, except that it can be reset, and that
`ru_maxrss` of a new process starts at the size of the process that launched it. Without /proc (not Linux) it is
`ru_maxrss`, which then must not have been higher before the pass.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.worker import WorkerError, environment

MIB = 1 << 20
STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")


def status_bytes(field: str) -> int:
    """VmRSS, VmHWM or RssFile of this process, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def max_rss() -> int:
    """`ru_maxrss` in bytes: macOS counts bytes, the others KiB."""
    value = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return value if sys.platform == "darwin" else value * 1024


class PeakMemory:
    """Context manager: how many bytes the resident memory rose inside.

    Attributes:
        risen: from entry to the peak.
        kept: from entry to exit.
        files: from entry to exit, pages of files (code) alone; 0 where the system does not tell.
    """

    risen = kept = files = 0

    def __enter__(self) -> PeakMemory:
        gc.collect()
        self._linux = STATUS.exists() and RESET.exists()
        if self._linux:
            RESET.write_text("5")  # VmHWM starts again at VmRSS
        self._before = status_bytes("VmRSS") if self._linux else max_rss()
        self._files = status_bytes("RssFile") if self._linux else 0
        return self

    def __exit__(self, *exception: object) -> None:
        peak = status_bytes("VmHWM") if self._linux else max_rss()
        self.risen = max(0, peak - self._before)
        self.kept = max(0, (status_bytes("VmRSS") if self._linux else peak) - self._before)
        self.files = max(0, status_bytes("RssFile") - self._files) if self._linux else 0


def measure(peer: str, problem: Any, tracked: bool = True) -> dict[str, Any]:
    """Build the peer here and run one pass; the row described above. Without `tracked` there is no second pass for
    `tracker_mib`, which is then null."""
    import torch

    from benchmarks.peers import peers_of
    from mirage.complexity import MemoryTracker

    torch.set_num_threads(problem.threads)
    with PeakMemory() as building:
        runner = peers_of(problem.mode)[peer].build(problem)
    with PeakMemory() as memory:
        start = time.perf_counter()
        result = runner.run()
        seconds = time.perf_counter() - start
    del result
    tracker_mib = None
    if tracked and runner.tensors:
        for tensor in runner.tensors:
            tensor.grad = None
        tracker = MemoryTracker()
        tracker.add(runner.tensors)
        with tracker:
            runner.run()
        tracker_mib = tracker.peak / MIB
    return {
        "peer": peer,
        "mode": problem.mode,
        "variant": problem.variant,
        "shape": list(problem.shape),
        "rss_mib": memory.risen / MIB,
        "code_mib": memory.files / MIB,
        "tracker_mib": tracker_mib,
        "built_mib": building.kept / MIB,
        "seconds": seconds,
    }


def measure_fresh(peer: str, problem: Any, tracked: bool = True) -> dict[str, Any]:
    """`measure` in a new process.

    Raises:
        WorkerError: that process failed.
    """
    request = json.dumps({"peer": peer, "problem": asdict(problem), "tracked": tracked})
    command = [sys.executable, "-m", "benchmarks.peak_memory", "--request", request]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(problem.threads), check=False)
    if done.returncode:
        raise WorkerError(f"exit status {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    from benchmarks.networks import NETWORKS
    from benchmarks.peers import INFERENCE, TRAINING, Problem

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", default="eager", choices=sorted({*INFERENCE, *TRAINING}))
    parser.add_argument("--mode", default="inference", choices=("inference", "forward", "step"))
    parser.add_argument("--variant", default="tiny", choices=tuple(NETWORKS))
    parser.add_argument("--code", default="", help="folder with checkouts of published code")
    parser.add_argument("--shape", type=int, nargs=4, default=(1, 3, 128, 128), metavar=("B", "C", "H", "W"))
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--request", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.request:
        request = json.loads(arguments.request)
        peer, fields, tracked = request["peer"], request["problem"], request["tracked"]
    else:
        tracked = True
        named = ("mode", "variant", "shape", "threads", "code")
        peer, fields = arguments.peer, {k: getattr(arguments, k) for k in named}
    problem = Problem(**{**fields, "shape": tuple(fields["shape"])})
    print(json.dumps(measure(peer, problem, tracked)))


if __name__ == "__main__":
    main()
