"""docs/family.md and the README's table of the networks beside MIRAGE, made of one run of the CPU peers.

    pytest benchmarks/test_cpu_peers.py --benchmark-only --networks restormer,... --benchmark-json=out/cpu-peers.json
    python -m benchmarks.family out/cpu-peers.json    # keeps its figures in benchmarks/results, writes both pages
    python -m benchmarks.family --write               # the pages anew, of the figures that they name

The run takes half an hour on a quiet machine, too long for every commit that touches a kernel. So the page says of
which sources its figures are, and, once they are no longer the present ones, that too; ``make lint`` holds it to that.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import measured_page
from benchmarks.measured_page import README, RESULTS, ROOT, fill, named, tell
from benchmarks.peers_report import (
    inference_section,
    load_all,
    machine,
    memory_section,
    paragraph,
    problems,
    ratio,
    short_section,
    step_section,
    versions_of,
)
from benchmarks.report import NAMES, Row, milliseconds, table

PAGE = Path("docs/family.md")
BLOCK = re.compile(r"(<!-- table: family -->\n).*?(<!-- end of family -->)", re.DOTALL)
ALSO = (Path("mirage/networks"),)
"""What decides these figures beside what decides those of MIRAGE."""

CHANGED = "**Kernels or networks have changed since these figures were taken.**"

Results = dict[str, Any]


def fingerprint(root: Path = ROOT) -> str:
    """A hash over everything that decides these figures."""
    return measured_page.fingerprint(root, ALSO)


def results_of(sources: Sequence[Path], command: str, root: Path = ROOT) -> Results:
    """What is kept of the JSON of a run, or of its parts.

    Raises:
        ValueError: the parts are not of one commit on one machine.
    """
    facts, rows = load_all(sources)
    kept = [{key: value for key, value in row.items() if key != "versions"} for row in rows]
    of_run = {"versions": versions_of(rows), "command": command, "sources": fingerprint(root)}
    return {"facts": {**facts, **of_run}, "rows": kept}


# ---- the pages -----------------------------------------------------------------------------------------------------


def conditions(facts: Row) -> str:
    return (
        f"{machine(facts, facts['versions'])}, {facts['date']}, commit {facts['commit']}. A product of matrices "
        f"reaches {2 * facts['macs_per_s'] / 1e9:.0f} GFLOP/s there, a copy {facts['copy_bytes_per_s'] / 1e9:.1f} GB/s."
    )


def page(results: Results, name: str, now: str) -> str:
    """docs/family.md of the results in the file `name`, where the sources are now `now`."""
    facts, rows = results["facts"], results["rows"]
    age = "The kernels and networks are those that were measured." if facts["sources"] == now else CHANGED
    lines = [
        *("# The family", "", "This page is generated; edit `benchmarks/family.py`.", ""),
        *paragraph(conditions(facts)),
        *(f"    {facts['command']}", "", f"Sources: `{facts['sources']}`.", f"Results: `{name}`.", ""),
        *(age, ""),
        *paragraph("""Random weights. Every engine runs in a process of its own, timed in turn with the others, so a
                   slow moment of the machine meets all of them. AdaIR and MoCE-IR are their authors' own code. AdaIR is
                   exported without its Fourier transforms, whose masks are empty for so small an image; MoCE-IR
                   OpenVINO cannot run, since experts are chosen by the values in the image, nor does its own code run
                   in bfloat16. Memory is that of further runs of the command; what is not here was not measured."""),
    ]  # fmt: skip
    for section in (short_section, inference_section, step_section, memory_section):
        lines += section(rows)
    return "\n".join(lines).rstrip() + "\n"


def readme_block(results: Results, now: str) -> str:
    """Milliseconds of a pass by each engine, a row for each network."""
    facts, rows = results["facts"], results["rows"]
    labels = {row["peer"]: row["label"] for row in rows if row["test"] == "test_inference"}
    body = []
    for (variant, shape), by_peer in problems(rows, "test_inference").items():
        times = [milliseconds(by_peer[name]["median"]) if name in by_peer else "-" for name in labels]
        body.append((NAMES[variant], shape.removeprefix("1x3x"), *times, ratio(by_peer["fast"], by_peer["eager"])))
    changed = "" if facts["sources"] == now else f" {CHANGED}"
    caption = (
        f"Networks of others by the same call, on {facts['device']}, {facts['threads']} threads, {facts['date']}:\n"
        f"median milliseconds of a pass ([all figures](docs/family.md)).{changed}"
    )
    header = ("", "image", *labels.values(), "eager takes")
    return "\n".join([caption, "", *table(header, body, left=2), ""])


def write(name: str, root: Path = ROOT) -> None:
    """Write docs/family.md and the README's table of the results in a file, relative to `root`."""
    results = json.loads((root / name).read_text(encoding="utf-8"))
    now = fingerprint(root)
    (root / PAGE).write_text(page(results, name, now), encoding="utf-8")
    readme = root / README
    readme.write_text(fill(readme.read_text(encoding="utf-8"), readme_block(results, now), BLOCK), encoding="utf-8")


def stale(root: Path = ROOT) -> Iterator[str]:
    """What is wrong with the generated pages; nothing where they say what was measured, and of which sources."""
    name = named(PAGE, root)
    if name is None:
        yield f"{PAGE} names no file of results that exists: see benchmarks/family.py"
        return
    results, now = json.loads((root / name).read_text(encoding="utf-8")), fingerprint(root)
    readme = (root / README).read_text(encoding="utf-8")
    wrong = [PAGE] if (root / PAGE).read_text(encoding="utf-8") != page(results, name, now) else []
    wrong += [README] if readme != fill(readme, readme_block(results, now), BLOCK) else []
    for path in wrong:
        yield f"{path} is not what {name} says of these sources: run python -m benchmarks.family --write"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, nargs="*", help="what --benchmark-json wrote, in one run or in parts")
    parser.add_argument("--command", default="make peers", help="that wrote it, for the page")
    parser.add_argument("--write", action="store_true", help="write the pages anew")
    arguments = parser.parse_args()
    if arguments.json:
        results = results_of(arguments.json, arguments.command)
        name = RESULTS / f"family-{results['facts']['date']}.json"
        (ROOT / name).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        write(name.as_posix())
    elif arguments.write:
        write(named(PAGE) or sys.exit(f"{PAGE} names no file of results that exists"))
    else:
        tell(stale())


if __name__ == "__main__":
    main()
