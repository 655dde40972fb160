"""The figures of docs/measured.md and the README: ``make measured``, about five minutes on two quiet cores.

Inference of both networks beside eager PyTorch and OpenVINO, a training step beside eager's, and Table 6. Needs the
extra `peers`. How times and memory are taken: see `test_cpu_peers`, whose engines and processes these are. Here are
fewer rounds, and results are compared with eager's in float32, which takes no minutes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import peak_memory
from benchmarks.measured_page import RESULTS, ROOT, fingerprint, write
from benchmarks.peers import Problem, errors, farthest, peers_of, versions
from benchmarks.worker import Worker
from mirage import table6
from mirage.doctor import cpu_name

INFERENCE = ("eager", "openvino-f32", "fast", "fast-bf16")
STEP = ("eager", "fast-low")
PROBLEMS = (
    ("inference", "tiny", (1, 3, 224, 224), 7),
    ("inference", "small", (1, 3, 224, 224), 5),
    ("inference", "tiny", (1, 3, 512, 768), 3),
    ("step", "tiny", (1, 3, 128, 128), 5),
)
"""Mode, network, shape of the image, rounds."""
TURN_SECONDS = 1.0


def measure(mode: str, variant: str, shape: tuple[int, ...], rounds: int, threads: int, folder: Path) -> list[dict]:
    """A row for each engine at one problem."""
    problem = Problem(mode, variant, shape, threads, str(folder))
    names = INFERENCE if mode == "inference" else STEP
    engines = {name: peers_of(mode)[name] for name in names}
    for engine in engines.values():
        if missing := engine.missing():
            sys.exit(f"{engine.label}: {missing}")
    say(f"{mode} {variant} {problem.size}: {rounds} rounds")
    outputs = {name: folder / f"{mode}-{variant}-{problem.size}-{name}.pt" for name in names}
    workers = {name: Worker(name, problem, outputs[name]) for name in names}
    try:
        samples: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(rounds):
            for name, worker in workers.items():
                samples[name].append(1e3 * worker.seconds(TURN_SECONDS))
    finally:
        for worker in workers.values():
            worker.close()
    say(f"{mode} {variant} {problem.size}: memory")
    expected = torch.load(outputs["eager"])
    rows = []
    for name, engine in engines.items():
        found = {key: relative for key, _, relative in errors(torch.load(outputs[name]), expected)}
        too_far = [key for key, relative in found.items() if not relative <= farthest(engine, key)]
        if too_far:
            sys.exit(f"{engine.label}, {mode} {variant} {problem.size}: {', '.join(too_far)} not as eager's: {found}")
        rows.append(
            {
                **{
                    "variant": variant,
                    "shape": list(shape),
                    "peer": name,
                    "label": engine.label,
                    "dtype": engine.dtype,
                },
                "ms": statistics.median(samples[name]),
                **{"ms_min": min(samples[name]), "ms_max": max(samples[name]), "rounds": rounds},
                "mib": peak_memory.measure_fresh(name, problem, tracked=False)["rss_mib"],
                "difference": max(found.values()),
            }
        )
    return rows


def measure_table6(size: int, runs: int, threads: int) -> dict[str, Any]:
    say("Table 6")
    torch.set_num_threads(threads)
    table = table6.run(size=size, runs=runs, on_step=say)
    return {"measured": [asdict(row) for row in table.measured], "paper": [asdict(row) for row in table.paper]}


def describe(command: str, threads: int) -> dict[str, Any]:
    from mirage_kernels import _native

    return {
        **{"device": cpu_name(), "isa": _native.cpu_isa(), "threads": threads, "torch": torch.__version__},
        **{"versions": versions(), "python": platform.python_version(), "date": f"{datetime.date.today()}"},
        **{"commit": commit(), "command": command, "sources": fingerprint()},
    }


def commit() -> str:
    try:
        command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def say(message: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S} {message}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="small images and one round, into out/, no page: a trial")
    arguments = parser.parse_args()
    problems = PROBLEMS
    if arguments.quick:
        problems = tuple(
            (mode, variant, (1, 3, 32, 32), 1) for mode, variant in (("inference", "tiny"), ("step", "tiny"))
        )
    before = fingerprint()
    results: dict[str, Any] = {"inference": [], "step": []}
    with tempfile.TemporaryDirectory() as folder:
        for mode, *problem in problems:
            results[mode] += measure(mode, *problem, arguments.threads, Path(folder))
    results["table6"] = measure_table6(32 if arguments.quick else 224, 1 if arguments.quick else 3, arguments.threads)
    results = {"conditions": describe("make measured", arguments.threads), **results}
    if results["conditions"]["sources"] != before:
        sys.exit("the sources changed while they were measured")
    name = f"cpu-{datetime.date.today()}.json"
    target = Path("out") / f"quick-{name}" if arguments.quick else RESULTS / name
    (ROOT / target).parent.mkdir(parents=True, exist_ok=True)
    (ROOT / target).write_text(json.dumps(results, indent=1) + "\n")
    say(f"wrote {target}")
    if not arguments.quick:
        write(target)


if __name__ == "__main__":
    main()
