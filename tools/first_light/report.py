"""The rows of a run as results.json and as a report that fits a screen or two: what is wrong, errors, times."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.gpu_report import groups, name_of, network_lines
from benchmarks.report import milliseconds, table
from mirage.whole_files import write_whole
from tools.first_light.pool import Row

RAN = ("ok", "left out")
"""Status of a row that is no cause for concern; others: wrong, failed, crashed, timed out, out of
memory, not reached."""
DTYPES = ("float32", "float16", "bfloat16")
MOST_PROBLEMS = 30
SHOWN = 160
"""Characters of a problem in the report; results.json has all of them."""


def plain(value: Any) -> Any:
    """The same without numbers that JSON does not have: "nan", "inf" and "-inf" in their place."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write(path: Path, facts: Row, rows: list[Row], finished: bool) -> None:
    """The results file; whole, whatever was there before."""
    content = {"machine": facts, "finished": finished, "rows": rows}
    write_whole(path, (json.dumps(plain(content), indent=1) + "\n").encode())


def text(facts: Row, rows: list[Row]) -> str:
    """The report; problems come last, where the end of a long output is what is seen."""
    sections = {
        "Parts": part_lines(rows),
        "Worst error, and what is allowed": truth_lines(rows),
        "Inference": network_lines(timed(rows), "test_inference"),
        "Training step": network_lines(timed(rows), "test_step"),
        "Memory of Table 6": memory_lines(rows),
        "Stages": stage_lines(facts, timed(rows)),
        "Problems": problem_lines(rows),
    }
    told = ("device", "torch", "triton", "commit", "date", "seconds")
    lines = [", ".join(f"{key} {facts[key]}" for key in told if key in facts)]
    for title, body in sections.items():
        if body:
            lines += ["", f"## {title}", "", *body]
    if "device" in facts and "date" in facts:
        lines += ["", f"to be kept as benchmarks/results/{name_of(facts)}.json"]
    return "\n".join(lines) + "\n"


def timed(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if "median" in row and "test" in row]


def part_lines(rows: list[Row]) -> list[str]:
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        counts.setdefault(row["part"], Counter())[row["status"]] += 1
    body = [(part, ", ".join(f"{n} {status}" for status, n in found.items())) for part, found in counts.items()]
    return table(("part", "rows"), body, left=2)


def truth_lines(rows: list[Row]) -> list[str]:
    """A line for an operator of an implementation, a column for a dtype: of all sizes the one nearest to its limit."""
    cells: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in rows:
        if row["kind"] == "operator":
            label = f"{row['name']} {row['mode']}".strip()
            cells.setdefault((label, row["implementation"]), {}).setdefault(row["dtype"], []).append(row)
        elif row["kind"] == "golden":
            label = f"{row['case']} {row['mode']}"
            cells.setdefault((label, row["implementation"]), {}).setdefault("float32", []).append(row)
    body = []
    for (label, implementation), by_dtype in cells.items():
        body.append((label, implementation, *(worst(by_dtype.get(dtype, [])) for dtype in DTYPES)))
    return table(("operator", "implementation", *DTYPES), body, left=2) if body else []


def worst(rows: list[Row]) -> str:
    """Error / allowed of the row nearest to its limit, how many are not right, and how many kernels declined."""
    if not rows:
        return "-"
    measured = [row for row in rows if isinstance(row.get("error"), float) and row.get("allowed")]
    bad, declined = sum(row["status"] not in RAN for row in rows), sum(bool(row.get("declined")) for row in rows)
    words = []
    if measured:
        row = max(measured, key=lambda r: math.inf if math.isnan(r["error"]) else r["error"] / r["allowed"])
        words.append(f"{row['error']:.1e} / {row['allowed']:.1e}")
    if bad:
        words.append(f"{bad} of {len(rows)} NOT RIGHT")
    elif not measured:
        words.append(rows[0]["status"])
    return ", ".join(words) + ("*" if declined else "")


def memory_lines(rows: list[Row]) -> list[str]:
    found = [row for row in rows if row["kind"] == "memory" and "memory_mib" in row]
    body = [(f"MIRAGE-{row['variant']}", row["implementation"], f"{row['memory_mib']:.0f}") for row in found]
    return table(("model", "modules", "MiB"), body, left=2) if body else []


def stage_lines(facts: Row, rows: list[Row]) -> list[str]:
    """Milliseconds, and in brackets the time of a copy of the least bytes over them."""
    rate = facts.get("copy_bytes_per_s")
    body = []
    for group, peers in groups(rows, "test_stage").items():
        cells = []
        for peer in ("eager", "fast", "cuda"):
            row = peers.get(peer)
            share = "" if row is None or rate is None else f" ({row['bytes'] / rate / row['median']:.0%})"
            cells.append(
                "-" if row is None else milliseconds(row["median"]) + share + ("*" if row.get("declined") else "")
            )
        body.append((group, *cells))
    return table(("stage", "eager ms", "Triton ms", "CUDA C++ ms"), body) if body else []


def problem_lines(rows: list[Row]) -> list[str]:
    """What is not right first, then what was not reached, in numbers."""
    bad = [row for row in rows if row["status"] not in (*RAN, "not reached")]
    lines = [f"- {described(row)}" for row in bad[:MOST_PROBLEMS]]
    if len(bad) > MOST_PROBLEMS:
        lines.append(f"- and {len(bad) - MOST_PROBLEMS} more, in results.json")
    reasons = Counter(row.get("problem", "") for row in rows if row["status"] == "left out")
    lines += [f"- {n} left out: {shortened(reason)}" for reason, n in reasons.items()]
    unreached = Counter(row["part"] for row in rows if row["status"] == "not reached")
    lines += [f"- {n} of {part} not reached" for part, n in unreached.items()]
    if any(row.get("declined") for row in rows):
        lines.append("- *: kernels declined a size, and others ran in their place (`declined` in results.json)")
    return lines


def described(row: Row) -> str:
    keys = (
        "kind",
        "name",
        "mode",
        "case",
        "half",
        "variant",
        "implementation",
        "peer",
        "dtype",
        "shape",
        "level",
        "both",
    )
    words = [str(row[key]) for key in keys if row.get(key) not in (None, "")]
    return f"{row['status']}: {' '.join(words)}: {shortened(row.get('problem', ''))}"


def shortened(problem: str) -> str:
    problem = re.sub(r"\s+", " ", problem)
    return problem if len(problem) <= SHOWN else f"{problem[: SHOWN // 2]} ... {problem[-SHOWN // 2 :]}"
