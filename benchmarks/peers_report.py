"""The JSON of the CPU peers and stages as out/cpu-peers.md and its plots.

    pytest benchmarks/test_cpu_peers.py benchmarks/test_stages.py --benchmark-only --benchmark-json=out/cpu-peers.json
    python -m benchmarks.peers_report out/cpu-peers.json

Every number comes from the file; nothing is measured here. Sections without rows are left out.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path

from benchmarks import peers_plots
from benchmarks.peers_plots import TITLES
from benchmarks.report import NAMES, OUT, Row, load, milliseconds, table

OURS = {"float32": "fast", "bfloat16": "fast-bf16"}
MODES = {
    "inference": "Inference: what a pass adds to the resident memory of a fresh process.",
    "forward": "Forward with autograd, in training mode, its graph kept.",
    "step": "Training step: forward, loss, backward.",
}
Problems = dict[tuple[str, str], dict[str, Row]]
Lines = list[str]


def size(row: Row) -> str:
    return "x".join(map(str, row["shape"]))


def problems(rows: list[Row], test: str, mode: str | None = None) -> Problems:
    """Rows of a test (and of one mode) by variant and size, and then by peer, in the order of the file."""
    found: Problems = {}
    for row in rows:
        if row["test"] == test and mode in (None, row["mode"]):
            found.setdefault((row["variant"], size(row)), {})[row["peer"]] = row
    return found


def paragraph(text: str) -> Lines:
    return [*textwrap.wrap(" ".join(text.split()), 118), ""]


def ratio(row: Row | None, other: Row | None) -> str:
    """How many times as long `other` took as `row`; a dash where one of them was not measured."""
    return "-" if row is None or other is None else f"{other['median'] / row['median']:.2f}x"


def share(row: Row, whole: Row | None, key: str) -> str:
    """A figure of `row` in percent of that of `whole`; a dash where one of them was not measured."""
    if whole is None or row[key] is None or not whole[key]:
        return "-"
    return f"{100 * row[key] / whole[key]:.0f}%"


def mebibytes(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


# ---- in short ------------------------------------------------------------------------------------------------------


def short_section(rows: list[Row]) -> Lines:
    """Ours beside eager and OpenVINO in float32: a line for each problem."""
    body = []
    for test, mode, ours in (("test_inference", "inference", "fast"), ("test_step", "step", "fast-low")):
        for (variant, shape), by_peer in problems(rows, test).items():
            fast = by_peer.get(ours)
            if fast is not None:
                against = (ratio(fast, by_peer.get(peer)) for peer in ("eager", "openvino-f32"))
                ms = f"{milliseconds(fast['median'])} ms"
                body.append((NAMES[variant], f"{TITLES[mode]}, time", shape, ms, *against))
    for mode, ours in (("inference", "fast"), ("forward", "fast-low"), ("step", "fast-low")):
        for (variant, shape), by_peer in problems(rows, "test_memory", mode).items():
            fast = by_peer.get(ours)
            if fast is not None:
                shares = (less(fast, by_peer.get(peer)) for peer in ("eager", "openvino-f32"))
                mib = f"{mebibytes(fast['rss_mib'])} MiB"
                body.append((NAMES[variant], f"{TITLES[mode]}, memory", shape, mib, *shares))
    if not body:
        return []
    header = ("network", "", "image", "mirage.fast", "eager has", "OpenVINO f32 has")
    return ["## In short", "", "float32. How many times as much the others take.", "", *table(header, body, left=3), ""]


def less(row: Row, other: Row | None) -> str:
    """How many times as much resident memory `other` added as `row`; a dash where one of them was not measured."""
    return "-" if other is None or not row["rss_mib"] else f"{other['rss_mib'] / row['rss_mib']:.2f}x"


# ---- time ----------------------------------------------------------------------------------------------------------


def inference_section(rows: list[Row]) -> Lines:
    found = problems(rows, "test_inference")
    if not found:
        return []
    lines = ["## Inference", ""]
    lines += paragraph(
        """Milliseconds: median and quartiles. Ours is faster: that time over ours in the same precision (mirage.fast
        for float32, mirage.fast in bf16 for bfloat16). Error: the largest difference from the reference in float64,
        absolute and relative to the largest value."""
    )
    header = ("peer", "computes in", "ms", "quartiles", "ours is faster", "error", "relative")
    for (variant, shape), by_peer in found.items():
        body = [
            (
                *(row["label"], row["dtype"], milliseconds(row["median"])),
                f"{milliseconds(row['q1'])} to {milliseconds(row['q3'])}",
                ratio(by_peer.get(OURS[row["dtype"]]), row),
                *(f"{row['error_restored']:.1e}", f"{row['relative_error_restored']:.1e}"),
            )
            for row in by_peer.values()
        ]
        rounds = next(iter(by_peer.values()))["rounds"]
        lines += [f"### {NAMES[variant]}, {shape} ({rounds} rounds)", "", *table(header, body, left=2), ""]
    return lines


def step_section(rows: list[Row]) -> Lines:
    found = problems(rows, "test_step")
    if not found:
        return []
    lines = ["## Training step", ""]
    lines += paragraph(
        """Forward, loss (of MIRAGE its own, of others L1) and backward, float32. Errors are those against the reference
        in float64; of the gradient, the norm of the difference over its norm, all parameters together. (Where a
        restored pixel equals the clean one up to rounding, the L1 loss has a gradient of either sign: one such pixel
        makes an error of about 1e-4.)"""
    )
    header = ("model", "batch", "peer", "ms", "quartiles", "against eager", "loss error", "gradient error")
    body = [
        (
            *(NAMES[variant], shape, row["label"], milliseconds(row["median"])),
            f"{milliseconds(row['q1'])} to {milliseconds(row['q3'])}",
            ratio(row, by_peer.get("eager")),
            *(f"{row['relative_error_loss']:.1e}", f"{row['relative_error_gradients']:.1e}"),
        )
        for (variant, shape), by_peer in found.items()
        for row in by_peer.values()
    ]
    return [*lines, *table(header, body, left=3), ""]


def scaling_section(rows: list[Row]) -> Lines:
    found = [row for row in rows if row["test"] == "test_scaling"]
    if not found:
        return []
    body = []
    for variant, label in dict.fromkeys((row["variant"], row["label"]) for row in found):
        mine = [row for row in found if (row["variant"], row["label"]) == (variant, label)]
        per_pixel = [row["median"] / (row["shape"][0] * row["shape"][2] * row["shape"][3]) for row in mine]
        body += [
            (
                *(NAMES[variant], label, size(row), milliseconds(row["median"])),
                *(f"{t * 1e6:.3f}", f"{t / min(per_pixel):.2f}"),
            )
            for row, t in zip(mine, per_pixel, strict=True)
        ]
    lines = ["## Time against the size of the image", ""]
    lines += paragraph("Inference, float32.")
    return [*lines, *table(("model", "", "image", "ms", "us per pixel", "over the least"), body, left=3), ""]


# ---- memory --------------------------------------------------------------------------------------------------------


def memory_section(rows: list[Row]) -> Lines:
    if not problems(rows, "test_memory"):
        return []
    lines = ["## Memory", ""]
    lines += paragraph(
        """MiB of one pass, each in a fresh process. Resident: how far the peak of resident memory (what ru_maxrss
        reports) rose above that before the pass, weights and image not included; code is the part of it that is
        pages of libraries read for the first time; built is what making the peer ready had added before, weights and
        the engine's libraries included. Tracker: `mirage.complexity`, the storages that PyTorch allocates, weights
        and image included."""
    )
    header = ("model", "image", "peer", "resident", "code", "built", "tracker", "of eager's resident", "of tracker's")
    for mode, title in MODES.items():
        body = []
        for (variant, shape), by_peer in problems(rows, "test_memory", mode).items():
            eager = by_peer.get("eager")
            for row in by_peer.values():
                shares = (share(row, eager, "rss_mib"), share(row, eager, "tracker_mib"))
                figures = (mebibytes(row[key]) for key in ("rss_mib", "code_mib", "built_mib", "tracker_mib"))
                body.append((NAMES[variant], shape, row["label"], *figures, *shares))
        if body:
            lines += [title, "", *table(header, body, left=3), ""]
    return lines


# ---- stages --------------------------------------------------------------------------------------------------------


def floor(facts: Row, row: Row) -> tuple[float, str]:
    """Seconds that the bytes or the multiply-adds of a row take at the machine's rates, and which of them it is."""
    by_bytes, by_products = row["bytes"] / facts["copy_bytes_per_s"], row["macs"] / facts["macs_per_s"]
    return (by_bytes, "bytes") if by_bytes > by_products else (by_products, "products")


def stage_section(facts: Row, rows: list[Row]) -> Lines:
    cases: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        if row["test"] == "test_half":
            key = (row["variant"], row["half"], row["direction"], size(row))
            cases.setdefault(key, {})[row["implementation"]] = row
    body = []
    for (variant, half, direction, shape), pair in cases.items():
        if {"eager", "fast"} <= pair.keys():
            fast = pair["fast"]
            least, bound = floor(facts, fast)
            body.append(
                (
                    *(NAMES[variant], half, shape, direction),
                    *(f"{fast['bytes'] / 1e6:.1f}", f"{fast['macs'] / 1e6:.0f}"),
                    *(milliseconds(least), bound, milliseconds(fast["median"]), f"{fast['median'] / least:.2f}"),
                    *(milliseconds(pair["eager"]["median"]), ratio(fast, pair["eager"])),
                )
            )
    if not body:
        return []
    header = (
        *("model", "half", "shape", "direction", "MB", "1e6 multiply-adds", "floor ms", "set by", "ours ms"),
        *("ours / floor", "eager ms", "speed-up"),
    )
    lines = ["## The halves of a block and their floors", ""]
    lines += paragraph(
        """For an image of 224x224, float32. Bytes: inputs, outputs and weights once (with backward: the gradients and
        the input again). Multiply-adds: products and convolutions of the reference (three times with backward);
        GELUs, sigmoids, norms and what backward recomputes are not counted, so no implementation can reach the floor.
        Floor: the longer of the bytes at the copy bandwidth and the multiply-adds at the rate of a matrix product."""
    )
    return [*lines, *table(header, body, left=4), ""]


def step_profile_section(facts: Row, rows: list[Row]) -> Lines:
    found = [row for row in rows if row["test"] == "test_network_step"]
    wholes = {row["variant"]: row for row in found if row["step"] == "the whole network"}
    body = []
    for row in found:
        whole = wholes.get(row["variant"])
        if whole is None:
            continue
        least = "-" if row["is_blocks"] or row is whole else milliseconds(floor(facts, row)[0])
        part = f"{100 * row['median'] / whole['median']:.1f}%"
        body.append((NAMES[row["variant"]], row["step"], milliseconds(row["median"]), part, least))
    for variant, whole in wholes.items():
        outside = sum(r["median"] for r in found if r["variant"] == variant and not r["is_blocks"] and r is not whole)
        part = f"{100 * outside / whole['median']:.1f}%"
        body.append((NAMES[variant], "everything outside the blocks", milliseconds(outside), part, "-"))
    if not body:
        return []
    lines = ["## Where a pass goes", "", "Inference of mirage.fast at 224x224, float32, every step timed alone.", ""]
    return [*lines, *table(("model", "step", "ms", "share", "floor ms"), body, left=2), ""]


# ---- the document --------------------------------------------------------------------------------------------------


def versions_of(rows: list[Row]) -> dict[str, str]:
    """Of the engines that were measured, by name."""
    return next((row["versions"] for row in rows if row.get("versions")), {})


def machine(facts: Row, versions: dict[str, str]) -> str:
    """What a run was measured on and with."""
    engines = "".join(f", {name} {version}" for name, version in versions.items())
    return f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}{engines}, Python {facts['python']}"


def heading(facts: Row, rows: list[Row]) -> Lines:
    lines = ["# The CPU path beside its peers", ""]
    lines += paragraph(
        f"""{machine(facts, versions_of(rows))},
        commit {facts["commit"]}, {facts["date"]}. Copy {facts["copy_bytes_per_s"] / 1e9:.1f} GB/s, matrix product
        {2 * facts["macs_per_s"] / 1e9:.0f} GFLOP/s, float32. Random weights. Every peer runs in a process of its own,
        timed in turn with the others; benchmarks/test_cpu_peers.py says how. Written by"""
    )
    return lines + [
        "    pytest benchmarks/test_cpu_peers.py benchmarks/test_stages.py --benchmark-only --peers all \\",
        "        --benchmark-json=out/cpu-peers.json",
        "    python -m benchmarks.peers_report out/cpu-peers.json",
        "",
    ]


def load_all(sources: Sequence[Path]) -> tuple[Row, list[Row]]:
    """The rows of several runs, of the same commit on the same machine: its facts are those of the first."""
    (facts, rows), *others = (load(source) for source in sources)
    for source, (other, more) in zip(sources[1:], others, strict=True):
        for name in ("device", "threads", "torch", "commit"):
            if other[name] != facts[name]:
                expected = f"expected {name} {facts[name]!r} as in {sources[0]}"
                raise ValueError(f"{source}: {expected}, got {other[name]!r}")
        rows += more
    return facts, rows


def write(sources: Sequence[Path], folder: Path = OUT) -> list[Path]:
    """Write cpu-peers.md and its plots to `folder`; the paths of all that was written.

    Raises:
        ValueError: the runs are not of one commit on one machine.
    """
    facts, rows = load_all(sources)
    folder.mkdir(parents=True, exist_ok=True)
    times = peers_plots.plot_times(rows, folder / "cpu-peers-time.png")
    memory = peers_plots.plot_memory(rows, folder / "cpu-peers-memory.png")
    lines = heading(facts, rows)
    lines += ["![time of every peer](cpu-peers-time.png)", ""] if times else []
    lines += ["![memory of every peer](cpu-peers-memory.png)", ""] if memory else []
    lines += short_section(rows)
    for section in (inference_section, step_section, memory_section, scaling_section):
        lines += section(rows)
    lines += stage_section(facts, rows) + step_profile_section(facts, rows)
    target = folder / "cpu-peers.md"
    target.write_text("\n".join(lines).rstrip() + "\n")
    return [path for path in (target, times, memory) if path]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, nargs="+", help="what --benchmark-json wrote, in one run or in parts")
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write to (default out/)")
    arguments = parser.parse_args()
    try:
        written = write(arguments.json, arguments.out)
    except ValueError as error:
        parser.error(str(error))
    for path in written:
        print(path)


if __name__ == "__main__":
    main()
