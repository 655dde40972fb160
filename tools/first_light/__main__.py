"""``python -m tools.first_light``: see tools/first_light.sh."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import sys
import tempfile
import time
from contextlib import ExitStack
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

from benchmarks.machine import commit
from tools.first_light import building, plan, report
from tools.first_light.pool import Pool, Row

ROOT = Path(__file__).resolve().parents[2]
TESTS = ("tests", "tests/kernels", "tests/mirage")
"""Folders whose modules the workers import."""
WITHOUT = ("MIRAGE_KERNELS", "MIRAGE_TUNING")
"""Settings that would change what runs."""
ON_HOST = {
    **{"TRITON_INTERPRET": "1", "MIRAGE_CUDA_EMULATE": "1", "CUDA_VISIBLE_DEVICES": ""},
    "TORCH_COMPILE_DISABLE": "1",  # for a CPU it compiles for minutes
}


class Run:
    """The parts one after the other, and what comes of them.

    Attributes:
        rows: all so far.
        facts: of the machine.
    """

    def __init__(self, out: Path, work: Path, dry: bool, library: Path | None, named_commit: str | None) -> None:
        self.rows: list[Row] = []
        self.facts: Row = {"commit": named_commit or commit(), "date": f"{datetime.date.today()}", "dry_run": dry}
        self._out, self._work, self._dry, self._library = out, work, dry, library
        self._site, self._start = work / "installed", time.monotonic()
        self._lines = (out / "rows.jsonl").open("w")
        self._build: building.Build | None = None

    def close(self) -> None:
        if self._build is not None:
            self._build.stop()
        self._lines.close()

    def run(self, parts: list[plan.Part]) -> None:
        """Each part by its deadline. The library is built beside those that may run then."""
        self._begin_to_build()
        deadline = self._start
        for part in parts:
            deadline += part.seconds
            if not part.beside_build:
                self._end_to_build()
            print(f"[{self._seconds():3.0f} s] {part.name}: {len(part.tasks)} tasks", flush=True)
            self._run_part(part, deadline)
            self._facts_of_rows()
            self.write(finished=False)
        self.write(finished=True)

    def write(self, finished: bool) -> None:
        self.facts["seconds"] = round(self._seconds(), 1)
        report.write(self._out / "results.json", self.facts, self.rows, finished)
        (self._out / "report.txt").write_text(report.text(self.facts, self.rows))

    def record(self, row: Row) -> None:
        self.rows.append(row)
        self._lines.write(json.dumps(report.plain(row)) + "\n")
        self._lines.flush()
        if row["status"] not in report.RAN:
            print(f"[{self._seconds():3.0f} s] {report.described(row)}", flush=True)

    def _run_part(self, part: plan.Part, deadline: float) -> None:
        threads = max(1, (os.cpu_count() or 1) // max(1, part.workers))
        pool = Pool(self._environment(part, threads), self._work, self.record)
        try:
            pool.run(part.tasks, part.workers, deadline)
        except Exception as error:  # of this script: the other parts are worth more than this one
            problem = f"{type(error).__name__}: {error}"
            self.record(self._row(part.name, "part", {"status": "failed", "problem": problem}))

    def _environment(self, part: plan.Part, threads: int) -> dict[str, str]:
        """Of a worker: the package that was built, where it is, before the checkout."""
        built = [] if part.beside_build or not (self._site / "mirage_kernels").is_dir() else [self._site]
        path = [*built, ROOT, *(ROOT / folder for folder in TESTS)]
        kept = {key: value for key, value in os.environ.items() if key not in WITHOUT}
        return {
            "TRITON_CACHE_DIR": str(self._work / "triton-cache"),
            "TORCHINDUCTOR_CACHE_DIR": str(self._work / "inductor-cache"),
            # without it products are not the same twice; where times are taken, what PyTorch chooses
            **({"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if part.workers > 1 else {}),
            **kept,
            "PYTHONPATH": os.pathsep.join(map(str, path)),
            "PYTHONFAULTHANDLER": "1",
            "OMP_NUM_THREADS": str(threads),
            **(ON_HOST if self._dry else {}),
        }

    def _begin_to_build(self) -> None:
        shutil.rmtree(self._site, ignore_errors=True)
        there = [ROOT / "mirage_kernels" / f"_cuda{suffix}" for suffix in EXTENSION_SUFFIXES]
        library = self._library or next((path for path in there if path.is_file() and not self._dry), None)
        if library is not None:
            row = building.place(library, self._site)
            self.record(self._row("build", "build", {**row, "library": str(library)}))
            return
        capability = None if self._dry else ".".join(map(str, torch.cuda.get_device_capability()))
        log, scratch = self._out / "build.log", self._work / "cmake"
        self._build = building.Build(self._site, scratch, log, capability, plan.BUILD_SECONDS)
        self._build.start()

    def _end_to_build(self) -> None:
        if self._build is None:
            return
        self.record(self._row("build", "build", self._build.outcome()))
        self._build = None
        if self._dry and (library := building.emulated()):
            self.record(self._row("build", "build", building.place(library, self._site)))

    def _facts_of_rows(self) -> None:
        for row in self.rows:
            if row["kind"] == "machine" and "facts" in row:
                self.facts |= row["facts"]
            elif row["kind"] == "rates" and "copy_bytes_per_s" in row:
                self.facts |= {key: row[key] for key in ("copy_bytes_per_s", "macs_per_s")}

    @staticmethod
    def _row(part: str, kind: str, found: Row) -> Row:
        return {"part": part, "kind": kind, **found}

    def _seconds(self) -> float:
        return time.monotonic() - self._start


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools/first_light.sh", description="The kernels on a GPU, in ten minutes.")
    parser.add_argument("--dry-run", action="store_true", help="every kind of step on tiny shapes, without a GPU")
    parser.add_argument(
        "--library", type=Path, metavar="FILE", help="a CUDA library (_cuda*.so) instead of building it"
    )
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "out" / "first-light"),
                        help="folder of the results (default: $OUT, or out/first-light)")  # fmt: skip
    parser.add_argument("--commit", help="of the sources, where there is no repository that tells it")
    parser.add_argument("--only", default="", metavar="WORDS", help="the parts with these words in their names")
    options = parser.parse_args(argv)
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("there is no CUDA GPU; --dry-run tries the steps out without one")
    if options.library is not None and not options.library.is_file():
        parser.error(f"--library: expected a file, got {options.library}")
    parts = [part for part in (plan.dry() if options.dry_run else plan.on_gpu()) if options.only in part.name]
    if not parts:
        parser.error(f"--only: no part has {options.only!r} in its name")
    options.out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        work = ROOT / "build" / "first-light"  # kept: what was compiled is there for the next run
        if options.dry_run:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="first-light-")))
        work.mkdir(parents=True, exist_ok=True)
        run = Run(options.out, work, options.dry_run, options.library, options.commit)
        stack.callback(run.close)
        run.run(parts)
    print("\n" + report.text(run.facts, run.rows))
    print(f"written: {options.out}/results.json")
    return 0 if all(row["status"] in report.RAN for row in run.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
