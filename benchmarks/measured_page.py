"""docs/measured.md and the README's table, made of one file of results, and the check that both are of this code.

    python -m benchmarks.measured_page           # fails where a page is not what the results say, or the code changed
    python -m benchmarks.measured_page --write RESULTS.json

`make measured` measures and writes them; `make lint` checks. A results file carries a hash over the contents of every
file that decides what was measured (`fingerprint`), so a commit that changes none of them leaves the page valid.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path("benchmarks/results")
PAGE = Path("docs/measured.md")
README = Path("README.md")
TABLE = re.compile(r"(<!-- table: inference -->\n).*?(<!-- end of table -->)", re.DOTALL)
SOURCE = re.compile(r"^Results: `([^`]+)`\.$", re.MULTILINE)

MEASURED = (
    *(
        "CMakeLists.txt",
        "cmake",
        "csrc/common",
        "csrc/include",
        "csrc/ops",
        "csrc/python",
        "mirage_kernels",
        "mirage/fast",
    ),
    *("mirage/blocks.py", "mirage/model.py", "mirage/losses.py", "mirage/complexity.py", "mirage/table6.py"),
    *("benchmarks/measured.py", "benchmarks/networks.py", "benchmarks/peers.py", "benchmarks/worker.py"),
    "benchmarks/peak_memory.py",
)
"""Files and folders that decide what is measured, on a CPU."""
SUFFIXES = {".cpp", ".h", ".cmake", ".txt", ".py"}
ONLY_GPU = re.compile(r"^(_?triton|cuda|bind_cuda|emulat)")
"""Names of files and folders below those that only a GPU, or the emulation of one, runs."""

Results = dict[str, Any]
NAMES = {"tiny": "MIRAGE-T", "small": "MIRAGE-S"}


# ---- what was measured ---------------------------------------------------------------------------------------------


def measured_files(root: Path = ROOT, also: Iterable[Path] = ()) -> list[Path]:
    """The files below `root` that decide what is measured, relative to it, sorted; ``also`` are further ones."""
    found = []
    for name in (*MEASURED, *also):
        top = root / name
        for path in [top] if top.is_file() else top.rglob("*"):
            inside = path.relative_to(root)
            if path.is_file() and path.suffix in SUFFIXES and not any(ONLY_GPU.match(part) for part in inside.parts):
                found.append(inside)
    return sorted(found)


def fingerprint(root: Path = ROOT, also: Iterable[Path] = ()) -> str:
    """A hash over names and contents of `measured_files`."""
    digest = hashlib.sha256()
    for path in measured_files(root, also):
        content = (root / path).read_bytes().replace(b"\r\n", b"\n")
        digest.update(f"{path.as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


# ---- the page ------------------------------------------------------------------------------------------------------


def size(row: Results) -> str:
    batch, _, height, width = row["shape"]
    return f"{height}x{width}" if batch == 1 else f"{batch} x {height}x{width}"


def number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]], left: int = 1) -> list[str]:
    """A table whose first `left` columns are text, and the others numbers."""
    header = list(header)
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * left + "---:|" * (len(header) - left)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows)]


def problems(rows: list[Results]) -> dict[tuple[str, str], dict[str, Results]]:
    """Rows by network and size of image, and then by peer, in their order."""
    found: dict[tuple[str, str], dict[str, Results]] = {}
    for row in rows:
        found.setdefault((NAMES[row["variant"]], size(row)), {})[row["peer"]] = row
    return found


def inference_table(results: Results) -> list[str]:
    """A row for each engine, two columns (ms, MiB) for each network and size of image: the README's table."""
    found = problems(results["inference"])
    labels = {row["peer"]: row["label"] for row in results["inference"]}
    header = ["", *(text for model, shape in found for text in (f"{model} {shape}, ms", "MiB"))]
    body = []
    for peer, label in labels.items():
        cells = [label]
        for by_peer in found.values():
            row = by_peer.get(peer)
            cells += ["-", "-"] if row is None else [number(row["ms"]), number(row["mib"])]
        if peer.startswith("fast"):
            cells = [f"**{cell}**" for cell in cells]
        body.append(cells)
    return markdown(header, body)


def conditions(results: Results) -> str:
    c = results["conditions"]
    engines = "".join(f", {name} {version}" for name, version in c["versions"].items())
    return (
        f"{c['device']} ({c['isa']}), {c['threads']} threads, torch {c['torch']}{engines}, Python {c['python']}, "
        f"{c['date']}, commit {c['commit']}, `{c['command']}`."
    )


def detail_table(rows: list[Results]) -> list[str]:
    header = ("network", "image", "engine", "ms", "fastest to slowest", "eager takes", "MiB", "of eager's", "max diff")
    body = []
    for (model, shape), by_peer in problems(rows).items():
        eager = by_peer["eager"]
        for row in by_peer.values():
            body.append(
                (
                    *(model, shape, row["label"], number(row["ms"])),
                    f"{number(row['ms_min'])} to {number(row['ms_max'])}",
                    f"{eager['ms'] / row['ms']:.2f}x",
                    *(number(row["mib"]), f"{100 * row['mib'] / eager['mib']:.0f}%"),
                    "" if row is eager else f"{row['difference']:.1e}",
                )
            )
    return markdown(header, body, left=3)


def table6(results: Results) -> list[str]:
    header = ("method", "source", "PSNR dB", "parameters M", "MACs G", "memory MiB", "forward s")
    body = []
    for row in results["table6"]["paper"]:
        cells = (number(row["psnr"], 2), number(row["params"], 2), number(row["gmacs"]), number(row["memory"]), "")
        body.append((row["method"], "paper", *cells))
        for ours in results["table6"]["measured"]:
            if ours["method"] == row["method"]:
                cells = ("", number(ours["params"], 2), number(ours["gmacs"], 2), number(ours["memory_mib"]))
                body.append((row["method"], f"ours, {ours['implementation']}", *cells, number(ours["seconds"], 3)))
    return markdown(header, body, left=2)


def page(results: Results, name: str) -> str:
    """docs/measured.md of the results in the file `name`."""
    lines = [
        *("# Measured", "", "This page is generated; edit `benchmarks/measured_page.py`.", ""),
        *(conditions(results), "", f"Sources: `{results['conditions']['sources']}`.", f"Results: `{name}`.", ""),
        "Random weights. Every engine runs in a process of its own, in turn with the others, so a slow moment of",
        "the machine meets all of them. MiB is how far the peak of a fresh process' resident memory rises in its",
        "first pass: weights, image and what the engine allocated when it was built are not counted. Times are medians",
        "of the rounds.",
        *("", "## Inference", "", *inference_table(results), "", *detail_table(results["inference"]), ""),
        "Max diff: largest difference from eager's result in float32, over its largest magnitude.",
        *("", "## Training step", "", "Forward, `MirageLoss` and backward, float32.", ""),
        *(*detail_table(results["step"]), "", "Max diff: the norm of the gradients' difference over their norm."),
        *("", "## Table 6 of the paper, and ours", "", *table6(results), ""),
        "Memory is the peak of one training-mode forward pass at 224x224 with autograd, parameters included; the paper",
        "calls MACs FLOPs and prints its memory as M. Forward is the median of evaluation-mode passes. PSNR is the",
        "mean over three degradations; it depends on trained weights, so ours has none. A dash: not reported.",
    ]
    return "\n".join(lines) + "\n"


def readme_block(results: Results) -> str:
    c = results["conditions"]
    caption = (
        f"Inference on {c['device']} ({c['isa']}), {c['threads']} threads, {c['date']} (`make measured`): median\n"
        "milliseconds of a pass, and MiB that a process grows by in it."
    )
    return "\n".join([caption, "", *inference_table(results), ""])


def fill(text: str, block: str, place: re.Pattern[str] = TABLE) -> str:
    """The README with `block` where its table is: between the two groups of `place`.

    Raises:
        ValueError: there is no place for it.
    """
    if not place.search(text):
        raise ValueError(f"README.md: expected a place for a table, {place.pattern}")
    return place.sub(lambda found: found[1] + block + found[2], text)


def write(results_file: Path, root: Path = ROOT) -> None:
    """Write docs/measured.md and the README's table."""
    results = json.loads((root / results_file).read_text())
    (root / PAGE).write_text(page(results, results_file.as_posix()), encoding="utf-8")
    readme = root / README
    readme.write_text(fill(readme.read_text(encoding="utf-8"), readme_block(results)), encoding="utf-8")


# ---- the check -----------------------------------------------------------------------------------------------------


def named(page: Path, root: Path = ROOT) -> str | None:
    """The file of results that a page names, where both are there."""
    text = (root / page).read_text(encoding="utf-8") if (root / page).is_file() else ""
    found = SOURCE.search(text)
    return found[1] if found and (root / found[1]).is_file() else None


def stale(root: Path = ROOT) -> Iterator[str]:
    """What is wrong with the generated pages; nothing where they are those of the present code."""
    if not (root / PAGE).exists():
        yield f"{PAGE} is missing: run make measured"
        return
    name = named(PAGE, root)
    if name is None:
        yield f"{PAGE} names no file of results that exists: run make measured"
        return
    results = json.loads((root / name).read_text())
    if (root / PAGE).read_text(encoding="utf-8") != page(results, name):
        yield f"{PAGE} is not what {name} says: run python -m benchmarks.measured_page --write {name}"
    readme = (root / README).read_text(encoding="utf-8")
    if readme != fill(readme, readme_block(results)):
        yield f"{README}: not the table of {name}: run python -m benchmarks.measured_page --write {name}"
    if results["conditions"]["sources"] != fingerprint(root):
        yield (
            f"{PAGE} was measured on other sources ({results['conditions']['sources']}; now {fingerprint(root)}): "
            "run make measured"
        )


def tell(found: Iterable[str]) -> NoReturn:
    """Print what is wrong, and end with status 1 where anything is."""
    problems = list(found)
    for problem in problems:
        print(problem, file=sys.stderr)
    sys.exit(1 if problems else 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="RESULTS", help="write the pages from this file")
    arguments = parser.parse_args()
    if arguments.write:
        write(arguments.write.resolve().relative_to(ROOT))
        return
    tell(stale())


if __name__ == "__main__":
    main()
