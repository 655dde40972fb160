"""The paper's Table 6 beside what this machine measures: ``mirage table6``.

Published rows: Table 6 of arXiv 2505.18679 v2 (ICLR 2026). A figure that it does not report is None and prints as a
dash. Ours: the reference and the fast modules, on a photograph, in one process, their timed passes interleaved so that
a slow moment of the machine meets them all; of MIRAGE-T and MIRAGE-S, and on request of the networks that they are
compared with, as far as they can be built (`METHODS`).
"""

from __future__ import annotations

import csv
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from mirage.complexity import measure

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "METHODS",
    "PAPER",
    "MeasuredRow",
    "Method",
    "PaperRow",
    "Table6",
    "build",
    "load_photograph",
    "not_built",
    "plot",
    "render",
    "run",
    "write_csv",
    "write_json",
]

Folder = str | Path | None
VARIANTS = ("T", "S")
IMPLEMENTATIONS = ("reference", "fast")
Bars = list[tuple[str, str, float | None]]


@dataclass(frozen=True)
class PaperRow:
    """A published row: PSNR in dB (mean over the three degradations), memory in MB as printed, parameters in millions,
    multiply-adds in 1e9 for 1x3x224x224. PSNR is None where the paper does not report it."""

    method: str
    psnr: float | None
    memory: float
    params: float
    gmacs: float


PAPER = (
    PaperRow("AirNet", 31.20, 4829, 8.93, 238),
    PaperRow("PromptIR", 32.06, 9830, 35.59, 132),
    PaperRow("IDR", None, 4905, 15.34, 98),
    PaperRow("AdaIR", None, 9740, 28.79, 124),
    PaperRow("MoCE-IR-S", 32.51, 4263, 11.48, 37),
    PaperRow("MoCE-IR", 32.73, 6654, 25.35, 75),
    PaperRow("MIRAGE-T", 32.77, 3729, 6.21, 16),
    PaperRow("MIRAGE-S", 32.91, 4810, 9.68, 27),
)
"""Table 6 of arXiv 2505.18679 v2, as printed and in its order."""


@dataclass(frozen=True)
class Method:
    """A network that can be measured.

    Attributes:
        name: in the paper.
        network: of `mirage.networks`, its arguments in ``arguments``; empty for MIRAGE itself.
        published: of `mirage.networks.published`: it is built by its authors' code, from a checkout that the user has.
    """

    name: str
    network: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    published: str = ""

    def missing(self, code: Folder) -> str:
        """Why it cannot be built with this folder of checkouts; empty where it can."""
        from mirage.networks import published

        return published.missing(self.published, code) if self.published else ""

    def create(self, code: Folder) -> nn.Module:
        import mirage
        from mirage import networks

        if self.published:
            assert code is not None
            return networks.published.create(self.published, code)
        if self.network:
            return networks.create(self.network, **self.arguments)
        return {"MIRAGE-T": mirage.mirage_tiny, "MIRAGE-S": mirage.mirage_small}[self.name]()


NAFNET = {"width": 32, "encoder_blocks": (1, 1, 1, 28), "middle_blocks": 1, "decoder_blocks": (1, 1, 1, 1)}
METHODS: Mapping[str, Method] = {
    "T": Method("MIRAGE-T"),
    "S": Method("MIRAGE-S"),
    "PromptIR": Method("PromptIR", "promptir"),
    "AdaIR": Method("AdaIR", published="adair"),
    "MoCE-IR-S": Method("MoCE-IR-S", published="moce-ir-s"),
    "MoCE-IR": Method("MoCE-IR", published="moce-ir"),
    "Restormer": Method("Restormer", "restormer"),
    "NAFNet": Method("NAFNet", "nafnet", NAFNET),
}
"""What can be measured, by the names that `run` takes. Restormer and NAFNet (of 17 million parameters) are in Table 2
of the paper alone."""


def not_built(code: Folder = None) -> dict[str, str]:
    """Methods of Table 6 and of `METHODS` that cannot be measured here, by their names in the paper, with the reason.

    Args:
        code: a folder with checkouts of published code, see `mirage.networks.published`.
    """
    named = {method.name: method for method in METHODS.values()}
    reasons = {row.method: "it is not in this package" for row in PAPER if row.method not in named}
    return reasons | {name: why for name, method in named.items() if (why := method.missing(code))}


@dataclass(frozen=True)
class MeasuredRow:
    """One of our rows.

    Attributes:
        method: as in the paper, such as ``"MIRAGE-T"``.
        implementation: ``"reference"`` or ``"fast"``.
        params: millions.
        gmacs: multiply-adds of one forward pass in 1e9.
        memory_mib: peak over one forward pass in training mode with autograd on, MiB.
        seconds: median time of one forward pass in evaluation mode without autograd.
        seconds_min, seconds_max: the fastest and the slowest pass.
        difference: largest absolute difference of the output from the reference's, on the scale where white is 1.
        uncounted: operators that ran without a FLOP formula, so that ``gmacs`` lacks their multiply-adds.
    """

    method: str
    implementation: str
    params: float
    gmacs: float
    memory_mib: float
    seconds: float
    seconds_min: float
    seconds_max: float
    difference: float | None
    uncounted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table6:
    """The measured rows, the conditions they hold for, and the published rows."""

    conditions: dict[str, Any]
    measured: tuple[MeasuredRow, ...]
    paper: tuple[PaperRow, ...] = PAPER


def load_photograph(path: str | Path | None, size: int) -> Tensor:
    """A photograph as the input: its largest centred square, resized to ``size``.

    Args:
        path: a PNG or JPEG file; None for scikit-image's astronaut, which its wheel contains.
        size: side of the result in pixels, a multiple of 8.

    Returns:
        ``[1, 3, size, size]`` float32 in [0, 1].

    Raises:
        ValueError: ``size`` is not a positive multiple of 8, or the file is no image (``mirage.images.ImageError``).
    """
    from PIL import Image

    if size <= 0 or size % 8:
        raise ValueError(f"size: expected a positive multiple of 8, got {size}")
    if path is None:
        from skimage import data

        pixels = data.astronaut()
    else:
        from mirage.images import read_image

        pixels = read_image(path).pixels
        if pixels.dtype == np.uint16:
            pixels = (pixels // 257).astype(np.uint8)
        pixels = pixels[..., :1].repeat(3, axis=2) if pixels.shape[2] < 3 else pixels[..., :3]
    side = min(pixels.shape[:2])
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    square = Image.fromarray(np.ascontiguousarray(pixels[top : top + side, left : left + side]))
    resized = np.asarray(square.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    return torch.from_numpy(resized).permute(2, 0, 1)[None].contiguous()


def run(
    *,
    image: str | Path | None = None,
    size: int = 224,
    runs: int = 5,
    device: str = "cpu",
    seed: int = 0,
    memory: str = "auto",
    variants: Sequence[str] = VARIANTS,
    implementations: Sequence[str] = IMPLEMENTATIONS,
    code: Folder = None,
    on_step: Callable[[str], None] = lambda message: None,
) -> Table6:
    """Measure our rows.

    The weights are random, from ``seed``: neither cost nor memory depends on them (except of MoCE-IR, which chooses one
    of four experts in a block by them, and by a draw that is the same in every pass). Time is that of a forward pass in
    evaluation mode; memory that of :func:`mirage.complexity.measure`, in training mode.

    Args:
        image: see :func:`load_photograph`; ``size`` too.
        runs: timed passes of each row, after one to warm up; at least 1.
        device: where to run, such as ``"cpu"`` or ``"cuda"``.
        memory: see :func:`mirage.complexity.measure`.
        variants: which of `METHODS`.
        implementations: which of ``"reference"`` and ``"fast"``.
        code: a folder with checkouts of published code, which some of `METHODS` are built by.
        on_step: told what is measured next.

    Raises:
        ValueError: an argument is not one of those named, or a method cannot be built (`not_built` says why).
    """
    for name, given, known in (("variants", variants, METHODS), ("implementations", implementations, IMPLEMENTATIONS)):
        if not given or set(given) - set(known):
            raise ValueError(f"{name}: expected some of {', '.join(known)}, got {', '.join(given) or 'none'}")
    for variant in variants:
        if reason := METHODS[variant].missing(code):
            raise ValueError(f"variants: {variant} cannot be built: {reason}")
    if runs < 1:
        raise ValueError(f"runs: expected at least 1, got {runs}")
    x = load_photograph(image, size).to(device)
    rows: list[MeasuredRow] = []
    for variant in variants:
        models = {name: build(variant, name, seed, code).to(x.device) for name in implementations}
        rows += _measure_method(METHODS[variant].name, models, x, runs, memory, on_step)
    return Table6(_conditions(image, x, runs, seed, memory), tuple(rows))


def _measure_method(method, models, x, runs, memory, on_step) -> list[MeasuredRow]:
    on_step(f"{method}: time of a forward pass, {', '.join(models)}")
    times, outputs = _time_interleaved(models, x, runs)
    rows = []
    for name, model in models.items():
        on_step(f"{method} {name}: memory of a training forward pass")
        cost = measure(model, x=x, memory=memory)
        difference = None
        if name != "reference" and "reference" in outputs:
            difference = (outputs[name].double() - outputs["reference"].double()).abs().max().item()
        rows.append(
            MeasuredRow(
                method=method,
                implementation=name,
                params=cost.parameters / 1e6,
                gmacs=cost.gmacs,
                memory_mib=cost.peak_memory_mib,
                seconds=statistics.median(times[name]),
                seconds_min=min(times[name]),
                seconds_max=max(times[name]),
                difference=difference,
                uncounted=cost.uncounted_operators,
            )
        )
    return rows


def build(variant: str, implementation: str, seed: int, code: Folder = None) -> nn.Module:
    """A model with random weights from `seed`, in evaluation mode.

    Args:
        variant: one of `METHODS`.
        implementation: ``"reference"`` or ``"fast"``.
        code: see `run`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = METHODS[variant].create(code).eval()
        if variant not in VARIANTS:
            _perturb(model)
    if implementation == "fast":
        import mirage.fast

        model = mirage.fast.accelerate(model)
    return model


@torch.no_grad()
def _perturb(model: nn.Module) -> None:
    """Take parameters off values that all elements share: where branches begin with a factor of 0 the network would be
    the identity, whatever its blocks compute."""
    for parameter in model.parameters():
        if parameter.numel() > 1 and (parameter == parameter.flatten()[0]).all():
            parameter.add_(0.1 * torch.randn_like(parameter))


@torch.inference_mode()
def _time_interleaved(
    models: dict[str, nn.Module], x: Tensor, runs: int
) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    """Seconds of every pass and each model's output, one pass of each model in turn, all with the same random numbers:
    some networks draw in evaluation mode too."""
    outputs: dict[str, Tensor] = {}
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.random.fork_rng():
        for turn in range(runs + 1):
            for name, model in models.items():
                torch.manual_seed(0)
                _synchronize(x)
                start = time.perf_counter()
                y = model(x)
                _synchronize(x)
                if turn == 0:  # to warm up
                    outputs[name] = y
                else:
                    times[name].append(time.perf_counter() - start)
    return times, outputs


def _synchronize(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def _conditions(image, x: Tensor, runs: int, seed: int, memory: str) -> dict[str, Any]:
    from mirage.doctor import cpu_name

    return {
        "image": "scikit-image astronaut" if image is None else str(image),
        "input_size": list(x.shape),
        "dtype": str(x.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(x.device) if x.is_cuda else cpu_name(),
        "threads": torch.get_num_threads(),
        "runs": runs,
        "seed": seed,
        "memory_method": memory,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "units": {"params": "1e6", "gmacs": "1e9 multiply-adds", "memory_mib": "MiB", "seconds": "s"},
    }


def render(table: Table6, console: Console) -> None:
    """Print the table to a rich console: each published row, ours under those they reproduce."""
    from rich.table import Table as RichTable

    grid = RichTable(title="Table 6 of arXiv 2505.18679, and ours", title_justify="left")
    for at, column in enumerate(COLUMNS):
        grid.add_column(column, justify="left" if at < 2 else "right", no_wrap=True)
    published = {row.method: row for row in table.paper}
    others = {m.method: None for m in table.measured if m.method not in published}
    for method, row in (published | others).items():
        ours = [m for m in table.measured if m.method == method]
        if ours:
            grid.add_section()
        if row is None:
            grid.add_row(method, "not in Table 6")
        else:
            cells = map(_number, (row.psnr, row.params, row.gmacs, row.memory), (".2f", ".2f", ".0f", ".0f"))
            grid.add_row(method, "paper", *cells, style=None if ours else "dim")
        base = next((m.seconds for m in ours if m.implementation == "reference"), None)
        for m in ours:
            grid.add_row("", f"ours, {m.implementation}", *_cells(m, base), style="bold")
    console.print(grid)
    for line in _notes(table):
        console.print(line, highlight=False, markup=False)


MOCE_IR = (
    "MoCE-IR runs one of four experts of different sizes in a block of its decoder: its random weights and a draw, "
    "which is the same in every pass, decide which."
)
COLUMNS = ("Method", "Source", "PSNR dB", "Params M", "MACs G", "Memory MiB", "Forward s", "Speed", "Max diff")


def _cells(row: MeasuredRow, base: float | None) -> tuple[str, ...]:
    speed = "" if base is None or row.implementation == "reference" else f"{base / row.seconds:.2f}x"
    return (
        "",
        f"{row.params:.2f}",
        f"{row.gmacs:.2f}",
        f"{row.memory_mib:.0f}",
        f"{row.seconds:.3f}",
        speed,
        _number(row.difference, ".1e") if speed else "",
    )


def _notes(table: Table6) -> list[str]:
    """What the columns mean and what the measured rows hold for."""
    c = table.conditions
    notes = [
        f"Input {'x'.join(map(str, c['input_size']))} {c['dtype']}, {c['image']}; random weights. "
        f"{c['device']}, {c['threads']} threads, torch {c['torch']}.",
        "MACs: multiply-adds of one forward pass, which the paper calls FLOPs. Memory: peak over one forward pass in "
        "training mode with autograd on, parameters included; the paper prints its figures as M.",
        f"Forward: median of {c['runs']} passes in evaluation mode. Max diff: largest difference from the reference's "
        "output, white being 1. PSNR: mean over three degradations, as published; the paper reports none for "
        + " and ".join(row.method for row in table.paper if row.psnr is None) + ".",
    ]
    uncounted = sorted({name for row in table.measured for name in row.uncounted})
    if uncounted:
        notes.append(f"Without a FLOP formula, so missing from MACs: {', '.join(uncounted)}.")
    if any(row.method.startswith("MoCE-IR") for row in table.measured):
        notes.append(MOCE_IR)
    return notes


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def write_json(table: Table6, path: str | Path) -> None:
    """Write conditions, measured and published rows as one JSON object."""
    content = {
        "conditions": table.conditions,
        "measured": [asdict(row) for row in table.measured],
        "paper": [asdict(row) for row in table.paper],
    }
    Path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_csv(table: Table6, path: str | Path) -> None:
    """Write all rows under one header: published rows have ``implementation`` ``paper``; empty where there is no
    figure."""
    header = ["method", "implementation", "psnr", *(f.name for f in fields(MeasuredRow)[2:])]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, header, restval="")
        writer.writeheader()
        for row in table.paper:
            cells = {"psnr": row.psnr, "params": row.params, "gmacs": row.gmacs, "memory_mib": row.memory}
            writer.writerow({"method": row.method, "implementation": "paper", **_present(cells)})
        for measured in table.measured:
            writer.writerow(_present({**asdict(measured), "uncounted": " ".join(measured.uncounted)}))


def _present(cells: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in cells.items() if value is not None}


def plot(table: Table6, path: str | Path) -> None:
    """Draw memory and time as horizontal bars; the suffix of ``path`` sets the format."""
    from matplotlib.figure import Figure

    colours = {"paper": "#9aa5b1", "reference": "#4878a8", "fast": "#d1603d"}
    published = [(row.method, "paper", row.memory) for row in table.paper]
    ours: Bars = [(row.method, row.implementation, row.memory_mib) for row in table.measured]
    figure = Figure(figsize=(11, 0.34 * (len(published) + len(ours)) + 1.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _bars(left, published + ours, colours, "{:.0f}", "peak memory of a training forward pass, MiB")
    times: Bars = [(row.method, row.implementation, row.seconds) for row in table.measured]
    _bars(right, times, colours, "{:.3f}", "time of an evaluation forward pass, s")
    size = "x".join(map(str, table.conditions["input_size"]))
    figure.suptitle(f"{size}, {table.conditions['device']}, {table.conditions['threads']} threads", fontsize=10)
    figure.savefig(path, dpi=150)


def _bars(axes, bars: Bars, colours: dict[str, str], spec: str, title: str) -> None:
    bars = [bar for bar in bars if bar[2] is not None][::-1]
    labels = [f"{method}, {kind}" for method, kind, _ in bars]
    drawn = axes.barh(labels, [value for *_, value in bars], color=[colours[kind] for _, kind, _ in bars])
    axes.bar_label(drawn, labels=[spec.format(value) for *_, value in bars], padding=3, fontsize=8)
    axes.set_title(title, fontsize=10)
    axes.margins(x=0.15)
    axes.set_ylim(-0.6, max(len(bars), 4) - 0.4)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
