"""``mirage evaluate``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from mirage.commands.common import device_named, reading_weights, require

__all__ = ["evaluate"]

FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)
PROTOCOLS = ["3deg", "5deg", "cdd11", "allweather", "underwater", "udc", "dehaze", "derain", "denoise"]
METHODS = ["cbm3d", "nlm", "identity"]
ATTENTION = ["auto", "whole", "tile", "local", "global"]


@click.command()
@click.option("--set", "sets", multiple=True, metavar="NAME=PLACE",
              help="Test images: a folder (input/ and target/, or clean ones), or a list. Repeatable.")  # fmt: skip
@click.option("--root", type=FOLDER, help="Folder below which the protocol's sets lie, as the released code has them.")
@click.option("--list-root", type=FOLDER, help="Where the paths of text files begin.  [default: the file's folder]")
@click.option("--weights", multiple=True, metavar="[LABEL=]CKPT",
              help="Checkpoint, or name of packaged weights. Repeatable.")  # fmt: skip
@click.option("--key", help="Which network, where the file holds several: params, state_dict_ema, net, ...")
@click.option("--method", "methods", multiple=True, type=click.Choice(METHODS), help="A classical method. Repeatable.")
@click.option("--protocol", "protocol_name", type=click.Choice(PROTOCOLS),
              help="The paper's sets, noise and metrics, with its rows beside ours.")  # fmt: skip
@click.option("--metrics", help="Comma-separated; see --list-metrics.  [default: psnr,ssim, or the protocol's]")
@click.option("--list-metrics", is_flag=True, help="Print every metric with its definition, and stop.")
@click.option("--sigma", "sigmas", multiple=True, type=click.FloatRange(min=0),
              help="Noise added to clean images, of 255. Repeatable.  [default: 15, 25, 50]")  # fmt: skip
@click.option("--kind", "kinds", multiple=True, metavar="KIND",
              help="Degradation of clean images, as of mirage degrade: GB, motion_blur, low_haze, all, ... Repeatable. "
                   "Without --sigma, there is no noise then.")  # fmt: skip
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of noise and degradations.")
@click.option("--noise", type=click.Choice(["float", "truncated"]),
              help="Noisy images clipped and not rounded, or truncated to 8 bits as in the released code."
                   "  [default: truncated with --protocol, else float]")  # fmt: skip
@click.option("--crop", type=click.IntRange(min=0),
              help="Cut images to multiples of this; 0: leave them whole.  [default: 16; 0 for cdd11]")  # fmt: skip
@click.option("--limit", type=click.IntRange(min=1), help="Only the first images of each set.")
@click.option("--json", "json_path", type=FILE, help="Keep results here, image by image; goes on from what it holds.")
@click.option("--overwrite", is_flag=True, help="Begin the file of --json anew.")
@click.option("--csv", "csv_path", type=FILE, help="Also write the results as CSV.")
@click.option("--sheets", type=FOLDER, help="Draw input, restored image, target and error of every image into it.")
@click.option("--paper/--no-paper", default=True, show_default=True, help="Print the paper's rows of the protocol.")
@click.option("--fast/--reference", default=True, show_default=True, help="The fast modules, or plain PyTorch.")
@click.option("--attention", default="auto", show_default=True, type=click.Choice(ATTENTION),
              help="How an image that is too large for one pass is restored, as of mirage restore.")  # fmt: skip
@click.option("--tile", type=click.IntRange(min=8), help="Side of tiles, as of mirage restore.")
@click.option("--overlap", type=click.IntRange(min=0), help="Of tiles, in pixels.  [default: 32, or half a tile]")
@click.option("--window", default=192, show_default=True, type=click.IntRange(min=8), help="Of local attention.")
@click.option("--memory", help="What restoring may take, such as 2G.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of PyTorch.  [default: its own choice]")
def evaluate(list_metrics: bool, csv_path: Path | None, protocol_name: str | None, paper: bool, **options: Any) -> None:
    """Measure restored images against their targets.

    PSNR and SSIM as the released evaluation computes them, or other metrics by name. Sets without inputs are clean
    images, to which Gaussian noise is added, reproducibly. Networks and classical methods stand in one table; with
    --protocol, beside the paper's. With --json a stopped evaluation goes on where it was.
    """
    from rich.console import Console

    from mirage.evaluate.metrics import METRICS
    from mirage.evaluate.protocols import protocol

    if list_metrics:
        for entry in METRICS.values():
            click.echo(f"{entry.name}: {entry.definition}")
        return
    modules = ["imagecodecs", "PIL", "skimage", *(["matplotlib"] if options["sheets"] else [])]
    require("evaluate", *modules)
    of = protocol(protocol_name) if protocol_name is not None else None
    try:
        evaluation = _run(of, **options)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    from mirage.evaluate import report

    report.render(evaluation, Console(width=None if sys.stdout.isatty() else 200), of, paper)
    if csv_path is not None:
        report.write_csv(evaluation, csv_path)
    for path in (options["json_path"], csv_path, options["sheets"]):
        if path is not None:
            click.echo(f"wrote {path}", err=True)
    sys.exit(1 if evaluation.failures else 0)


def _run(of: Any, *, sets, root, list_root, sigmas, kinds, metrics, seed, noise, crop, limit, json_path, overwrite,
         sheets, **of_methods: Any) -> Any:  # fmt: skip
    """The evaluation that the options ask for, under a progress bar on stderr."""
    from dataclasses import replace

    from mirage.evaluate.metrics import DEFAULT
    from mirage.evaluate.protocols import plan
    from mirage.evaluate.run import CROP, SIGMAS, evaluate

    names_of_kinds = _kinds(kinds)
    found = _sets(sets, root, list_root, of)
    _refuse_unused(sigmas, kinds, found, of)
    sigmas = sigmas or (() if names_of_kinds else SIGMAS)
    tasks, notes = plan(found, sigmas, of, names_of_kinds)
    default = of.metrics if of is not None else DEFAULT
    names = tuple(metrics.replace(" ", "").split(",")) if metrics else default
    _require_metrics(names)
    methods = _methods(**of_methods)
    with _progress() as on_step:
        evaluation = evaluate(
            tasks,
            methods,
            metrics=names,
            seed=seed,
            noise=noise or ("truncated" if of is not None else "float"),
            crop=crop if crop is not None else of.crop if of is not None else CROP,
            limit=limit,
            path=json_path,
            overwrite=overwrite,
            sheets=sheets,
            on_step=on_step,
        )
    return replace(evaluation, notes=(*notes, *evaluation.notes))


def _kinds(given: tuple[str, ...]) -> list[str]:
    from mirage.degradations import named

    return list(named(given))


def _sets(given: tuple[str, ...], root: Path | None, list_root: Path | None, of: Any) -> list:
    from mirage.evaluate.protocols import find_below
    from mirage.evaluate.sets import find_sets

    if root is not None and of is None:
        raise ValueError("--root needs --protocol, which says what to look for")
    found = find_below(root, of) if root is not None else []
    for each in given:
        name, equals, place = each.partition("=")
        if not equals or not name or not place:
            raise ValueError(f"--set: expected NAME=PLACE, got {each!r}")
        found += find_sets(name, place, list_root)
    if not found:
        raise ValueError("no sets: give --set NAME=PLACE" if root is None else f"no set of {of.table} below {root}")
    return found


def _refuse_unused(sigmas: tuple[float, ...], kinds: tuple[str, ...], sets: list, of: Any) -> None:
    """Refuse noise and degradations that no image would get: pairs have their own, and so have a protocol's columns."""
    columns = of.columns if of is not None else ()
    if any(each.clean and not any(column.is_of(each.name) for column in columns) for each in sets):
        return
    option = f"--sigma {sigmas[0]:g}" if sigmas else f"--kind {kinds[0]}" if kinds else None
    if option is not None:
        got = ", ".join(dict.fromkeys(each.name for each in sets))
        why = "what a protocol's own sets get it says itself" if columns else "pairs have inputs"
        raise ValueError(f"{option}: expected a set of clean images to apply it to, got {got}; {why}")


def _methods(*, weights: tuple[str, ...], methods: tuple[str, ...], device: str, threads: int | None,
             **of_network: Any) -> list:  # fmt: skip
    from mirage.evaluate.methods import CLASSICAL, Network

    if not weights and not methods:
        raise ValueError("nothing to evaluate: give --weights CKPT or --method")
    found: list = []
    if weights:
        import torch

        if threads:
            torch.set_num_threads(threads)
        for each in weights:
            label, equals, path = each.partition("=")
            with reading_weights():
                found.append(Network(path if equals else each, label if equals else None, device=device_named(device),
                                     **of_network))  # fmt: skip
    for name in dict.fromkeys(methods):
        if name == "cbm3d":
            require("baselines", "bm3d")
        found.append(CLASSICAL[name]())
    return found


def _require_metrics(names: tuple[str, ...]) -> None:
    from mirage.evaluate.metrics import metric

    if any(metric(name).requires == "lpips" for name in names):
        require("lpips", "lpips", "torchvision")


def _progress() -> Any:
    """A progress bar on stderr; what it yields takes steps done, all steps, and the name of the next."""
    from contextlib import contextmanager

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    @contextmanager
    def bar():
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("")
            yield lambda done, total, name: progress.update(task, completed=done, total=total, description=name)

    return bar()
