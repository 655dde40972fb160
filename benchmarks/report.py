"""The JSON of a benchmark run as tables and plots in out/: ``python -m benchmarks.report out/benchmarks.json``.

Every number comes from the file; nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.networks import NETWORKS

OUT = Path(__file__).resolve().parent.parent / "out"
NAMES = {name: network.label for name, network in NETWORKS.items()}
Row = dict[str, Any]


def load(path: Path) -> tuple[Row, list[Row]]:
    """The facts of the machine, and one row per benchmark: its extra_info with the median and the quartiles."""
    data = json.loads(path.read_text())
    rows = []
    for entry in data["benchmarks"]:
        stats = entry["stats"]
        times = {"median": stats["median"], "q1": stats["q1"], "q3": stats["q3"], "rounds": stats["rounds"]}
        rows.append({**entry["extra_info"], **times, "group": entry["group"], "test": entry["name"].split("[")[0]})
    return {**data["machine_info"]["mirage"], "date": data["datetime"][:10]}, rows


def milliseconds(seconds: float) -> str:
    ms = seconds * 1e3
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}" if ms >= 1 else f"{ms:.3f}"


def table(header: Iterable[str], rows: Iterable[Iterable[str]], left: int = 1) -> list[str]:
    """A Markdown table whose columns after the first `left` are aligned right."""
    header = list(header)
    lines = ["| " + " | ".join(header) + " |"]
    lines.append("|" + "|".join(["---"] * left + ["---:"] * (len(header) - left)) + "|")
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def operator_rows(facts: Row, rows: list[Row]) -> list[Row]:
    """One row per operator, shape and direction: eager, ours, their ratio and the floor."""
    cases: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if row["test"] in ("test_forward", "test_forward_backward"):
            cases.setdefault((row["group"], row["direction"]), {})[row["implementation"]] = row
    found = []
    for (group, direction), by_implementation in cases.items():
        eager = by_implementation.get("eager")
        ours = next((r for name, r in by_implementation.items() if name != "eager"), None)
        if eager is None or ours is None:
            continue
        both = direction != "forward"
        moved = ours["bytes_both"] if both else ours["bytes_forward"]
        macs = ours["macs_forward"] * (3 if both else 1)
        floor = max(moved / facts["copy_bytes_per_s"], macs / facts["macs_per_s"])
        found.append(
            {
                "size": group.split("-")[0],
                "operator": ours["operator"],
                "shape": "x".join(map(str, ours["shape"])),
                "direction": direction,
                "implementation": ours["implementation"],
                "eager": eager["median"],
                "ours": ours["median"],
                "speedup": eager["median"] / ours["median"],
                "floor": floor,
                "over_floor": ours["median"] / floor,
            }
        )
    return sorted(found, key=lambda r: (r["operator"], r["direction"], -int(r["size"])))


def operator_section(facts: Row, rows: list[Row]) -> list[str]:
    found = operator_rows(facts, rows)
    lines = ["## Operators", ""]
    lines += [
        "Each operator against the PyTorch expression it replaces, float32, at the shapes MIRAGE-T has for an image of",
        "224x224 and of 128x128. Floor: the least bytes at the copy bandwidth or the multiply-adds at the rate of a",
        "matrix product, both measured at the start of the run, whichever takes longer.",
        "",
    ]
    header = ("operator", "direction", "image", "shape", "eager ms", "ours ms", "speed-up", "floor ms", "ours / floor")
    body = [
        (
            *(f"`{r['operator']}`", r["direction"], r["size"], r["shape"]),
            *(milliseconds(r["eager"]), milliseconds(r["ours"]), f"{r['speedup']:.1f}x"),
            *(milliseconds(r["floor"]), f"{r['over_floor']:.1f}"),
        )
        for r in found
    ]
    return lines + table(header, body, left=4) + [""]


def model_section(rows: list[Row]) -> list[str]:
    cases: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if "workload" in row:
            cases.setdefault((row["workload"], row["variant"]), {})[row["implementation"]] = row
    body = []
    for (workload, variant), pair in cases.items():
        if {"eager", "fast"} <= pair.keys():
            eager, fast = pair["eager"]["median"], pair["fast"]["median"]
            name = f"MIRAGE-{variant[0].upper()}"
            body.append((workload, name, milliseconds(eager), milliseconds(fast), f"{eager / fast:.2f}x"))
    header = ("workload", "model", "eager ms", "fast ms", "speed-up")
    return ["## The whole network", "", *table(header, body, left=2), ""]


def table6_section(rows: list[Row]) -> list[str]:
    body = [
        (
            *(row["method"], row["implementation"]),
            *(f"{row['params']:.2f}", f"{row['gmacs']:.2f}", f"{row['memory_mib']:.0f}", milliseconds(row["median"])),
        )
        for row in rows
        if row["test"] == "test_row"
    ]
    header = ("model", "implementation", "parameters (1e6)", "multiply-adds (1e9)", "memory (MiB)", "forward (ms)")
    lines = ["## Table 6", "", "On a photograph of 224x224; memory is the peak of one training-mode forward pass."]
    return [*lines, "", *table(header, body, left=2), ""]


def plot_operators(found: list[Row], path: Path) -> None:
    """Speed-ups as bars, one panel per direction; the dashed line is eager."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    directions = ("forward", "forward+backward")
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 5.5), sharey=True, layout="constrained")
    for panel, direction in zip(panels, directions, strict=True):
        rows = [r for r in found if r["direction"] == direction and r["size"] == "224"]
        labels = [f"{r['operator']} {r['shape']}" for r in rows]
        panel.barh(labels, [r["speedup"] for r in rows], color="#3b6ea5")
        panel.set_xlim(left=0.8)
        panel.axvline(1, color="0.3", linestyle="--", linewidth=1)
        panel.set_xscale("log")
        top = max((r["speedup"] for r in rows), default=1.0)
        ticks = [1, 2, 5, 10, 20, 50, 100]
        panel.set_xticks(ticks[: 2 + sum(t < top for t in ticks[1:])], labels=None)
        panel.xaxis.set_major_formatter("{x:g}x")
        panel.minorticks_off()
        panel.set_title(direction)
        for label, row in zip(labels, rows, strict=True):
            panel.text(row["speedup"] * 1.05, label, f"{row['speedup']:.1f}x", va="center", fontsize=7)
        panel.margins(x=0.15)
        panel.tick_params(axis="y", labelsize=7)
    figure.suptitle("Speed-up over the PyTorch expression, MIRAGE-T shapes at 224x224")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def write(source: Path, folder: Path = OUT) -> Path:
    """Write benchmarks.md and its plot to `folder`; return the path of the former."""
    facts, rows = load(source)
    folder.mkdir(parents=True, exist_ok=True)
    found = operator_rows(facts, rows)
    geometric = math.exp(sum(math.log(r["speedup"]) for r in found) / len(found)) if found else float("nan")
    lines = [
        "# Benchmarks",
        "",
        f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, Python {facts['python']}, commit",
        f"{facts['commit']}, {facts['date']}. Copy {facts['copy_bytes_per_s'] / 1e9:.1f} GB/s, matrix product",
        f"{2 * facts['macs_per_s'] / 1e9:.0f} GFLOP/s. Medians; written by",
        "",
        "    pytest benchmarks --benchmark-only --benchmark-json=out/benchmarks.json",
        "    python -m benchmarks.report out/benchmarks.json",
        "",
        *table6_section(rows),
        *model_section(rows),
        *operator_section(facts, rows),
        f"Geometric mean of the {len(found)} speed-ups: {geometric:.1f}x.",
        "",
        "![speed-up of every operator](benchmarks.png)",
        "",
    ]
    target = folder / "benchmarks.md"
    target.write_text("\n".join(lines))
    plot_operators(found, folder / "benchmarks.png")
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, help="what --benchmark-json wrote")
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write to (default out/)")
    arguments = parser.parse_args()
    print(write(arguments.json, arguments.out))


if __name__ == "__main__":
    main()
