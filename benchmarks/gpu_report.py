"""The JSON of benchmarks/test_gpu.py as a results file and a table: ``python -m benchmarks.gpu_report out/gpu.json``.

Writes benchmarks/results/<gpu>-<date>.json: the machine, versions and commit, and a row per benchmark. Prints them in
Markdown. Every number comes from the file; nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from benchmarks.report import Row, load, milliseconds, table

RESULTS = Path(__file__).resolve().parent / "results"


def name_of(facts: Row) -> str:
    """nvidia-h200-2026-11-22"""
    return re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-") + f"-{facts['date']}"


def groups(rows: list[Row], test: str) -> dict[str, dict[str, Row]]:
    """Rows of a test by group, and then by peer, in the order of the file."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["test"] == test:
            found.setdefault(row["group"], {})[row["peer"]] = row
    return found


def network_lines(rows: list[Row], test: str) -> list[str]:
    lines = []
    for group, peers in groups(rows, test).items():
        eager = peers.get("eager")
        for peer, row in peers.items():
            error, peak = row.get("error"), row.get("peak_mib")
            quartiles = f"{milliseconds(row['q1'])} to {milliseconds(row['q3'])}"
            faster = "-" if eager is None else f"{eager['median'] / row['median']:.2f}x"
            last = ("-" if peak is None else f"{peak:.0f}", "-" if error is None else f"{error:.1e}")
            lines.append((group, peer, milliseconds(row["median"]), quartiles, faster, *last))
    header = ("problem", "peer", "ms", "quartiles", "against eager", "peak MiB", "error")
    return table(header, lines, left=2) if lines else []


def stage_lines(facts: Row, rows: list[Row]) -> list[str]:
    lines = []
    for group, peers in groups(rows, "test_stage").items():
        if {"eager", "fast"} <= peers.keys():
            eager, fast = peers["eager"], peers["fast"]
            share = fast["bytes"] / fast["median"] / facts["copy_bytes_per_s"]
            ratio = f"{eager['median'] / fast['median']:.2f}x"
            cuda = milliseconds(peers["cuda"]["median"]) if "cuda" in peers else "-"
            times = (milliseconds(eager["median"]), milliseconds(fast["median"]))
            lines.append((group, *times, ratio, f"{share:.0%}", cuda))
    header = ("stage", "eager ms", "ours ms", "faster", "least bytes / copy", "CUDA C++ ms")
    return table(header, lines) if lines else []


def write(facts: Row, rows: list[Row], folder: Path) -> Path:
    """The results file; an older one of the same GPU and day is replaced when the new one is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name_of(facts)}.json"
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")
    unfinished.replace(path)
    return path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path, help="what pytest-benchmark wrote")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder (default: benchmarks/results)")
    options = parser.parse_args(argv)
    facts, rows = load(options.json)
    machine = f"{facts['device']}, torch {facts['torch']}, commit {facts['commit']}, {facts['date']}"
    copy = f"copy {facts['copy_bytes_per_s'] / 1e12:.2f} TB/s"
    sections = {
        "Inference": network_lines(rows, "test_inference"),
        "Training step": network_lines(rows, "test_step"),
        "Stages": stage_lines(facts, rows),
    }
    print(f"{machine}, {copy}")
    for title, lines in sections.items():
        if lines:
            print(f"\n## {title}\n")
            print("\n".join(lines))
    print(f"\nwritten: {write(facts, rows, options.results)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
