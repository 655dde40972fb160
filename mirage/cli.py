"""The ``mirage`` command. Each subcommand imports what it needs when it runs, so that ``mirage --help`` is quick."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from mirage.evaluate.command import evaluate
from mirage.train.command import train

__all__ = ["main"]

FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)
WEIGHTS = click.option("--weights", required=True, type=FILE, help="Checkpoint: .ckpt, .pth or .safetensors.")
KEY = click.option("--key", help="Which network, where the file holds several: params, state_dict_ema, net, ...")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def main() -> None:
    """MIRAGE, all-in-one image restoration: measure it, restore images with it, check the installation."""


main.add_command(evaluate)
main.add_command(train)


@main.command()
@click.option("--image", type=FILE, help="Photograph for the forward pass.  [default: scikit-image's astronaut]")
@click.option("--size", default=224, show_default=True, help="Side of the centre-cropped, resized input in pixels.")
@click.option("--runs", default=5, show_default=True, type=click.IntRange(min=1), help="Timed passes of each row.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of PyTorch.  [default: its own choice]")
@click.option("--seed", default=0, show_default=True, help="Seed of the random weights.")
@click.option("--variant", "variants", multiple=True, type=click.Choice(["T", "S"]), help="Only this model.")
@click.option(
    "--implementation",
    "implementations",
    multiple=True,
    type=click.Choice(["reference", "fast"]),
    help="Only these modules.",
)
@click.option(
    "--memory",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "tracker", "cuda", "fake"]),
    help="How memory is found; 'fake' estimates it without allocating (a training pass takes up to 5 GiB).",
)
@click.option("--json", "json_path", type=FILE, help="Also write the rows as JSON.")
@click.option("--csv", "csv_path", type=FILE, help="Also write the rows as CSV.")
@click.option("--plot", "plot_path", type=FILE, help="Also draw memory and time as bars (.png, .svg, .pdf).")
def table6(image, size, runs, device, threads, seed, variants, implementations, memory, json_path, csv_path, plot_path):
    """Print the paper's Table 6 beside what this machine measures.

    Parameters in millions, multiply-adds of one forward pass in 1e9, peak memory of one training-mode forward pass in
    MiB, time of one evaluation-mode forward pass in seconds; batch 1.
    """
    import torch
    from rich.console import Console

    _require("bench", "PIL", *(() if image else ("skimage",)), *(("matplotlib",) if plot_path else ()))
    from mirage import table6 as table

    if threads:
        torch.set_num_threads(threads)
    status = Console(stderr=True)
    try:
        result = table.run(
            image=image,
            size=size,
            runs=runs,
            device=str(_device(device)),
            seed=seed,
            memory=memory,
            variants=variants or table.VARIANTS,
            implementations=implementations or table.IMPLEMENTATIONS,
            on_step=lambda message: status.print(message, style="dim"),
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    _print_table(result)
    for path, write in ((json_path, table.write_json), (csv_path, table.write_csv), (plot_path, table.plot)):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(result, path)
            status.print(f"wrote {path}", style="dim")


@main.command()
@click.argument("inputs", nargs=-1, required=True, metavar="IN...", type=click.Path(path_type=Path))
@WEIGHTS
@KEY
@click.option("-o", "--out", "out_dir", required=True, type=FOLDER, help="Output folder.")
@click.option(
    "--format",
    "format_",
    default="same",
    show_default=True,
    type=click.Choice(["same", "png", "jpeg"]),
    help="Format of the results; 'same' keeps each file's own, PNG bit depth included.",
)
@click.option("--quality", default=95, show_default=True, type=click.IntRange(1, 100), help="Of JPEG results.")
@click.option("--max-pixels", type=click.IntRange(min=1), help="Refuse larger images.  [default: 178956970]")
@click.option(
    "--check-memory/--no-check-memory",
    default=True,
    show_default=True,
    help="Refuse an image that needs more memory than there is, before it takes it.",
)
@click.option("--fast/--reference", default=True, show_default=True, help="The fast modules, or plain PyTorch.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of PyTorch.  [default: its own choice]")
def restore(inputs, weights, key, out_dir, format_, quality, max_pixels, check_memory, fast, device, threads):
    """Restore image files, or all PNG and JPEG files in folders, into a folder.

    8- and 16-bit PNG, grey or RGB, and JPEG. Alpha is copied through, grey files stay grey (a file with three equal
    channels counts as colour and may come back tinted). EXIF's orientation is applied; EXIF, XMP, colour profile and
    density are carried over. Results keep the names of their inputs and replace earlier results, never an input. A file
    that fails is reported and the others are still done; the exit status is then 1. Pictures in other formats, sidecars
    of macOS (._a.jpg) and links to nothing are skipped in folders, and named.
    """
    import torch

    _require("images", "PIL", "imagecodecs")
    from mirage import restore as restoring

    if threads:
        torch.set_num_threads(threads)
    skipped: list[tuple[Path, str]] = []
    jobs = restoring.collect_jobs(inputs, out_dir, format_, on_skip=lambda *file: skipped.append(file))
    with _reading_weights():
        model = restoring.load_model(weights, fast=fast, device=_device(device), key=key)
    options = {"format": format_, "quality": quality, "check_memory": check_memory}
    failed = _restore_with_progress(
        restoring, model, jobs, {**options, **({"max_pixels": max_pixels} if max_pixels else {})}
    )
    if skipped:
        click.echo(_describe_skipped(skipped), err=True)
    click.echo(f"restored {len(jobs) - failed} of {len(jobs)} into {out_dir}")
    sys.exit(1 if failed else 0)


def _describe_skipped(skipped: list[tuple[Path, str]], listed: int = 5) -> str:
    """One line on the files of folders that were left out."""
    names = [f"{path} ({reason})" for path, reason in skipped[:listed]]
    more = [f"and {len(skipped) - listed} more"] if len(skipped) > listed else []
    return f"skipped {len(skipped)} in folders: " + ", ".join([*names, *more])


def _restore_with_progress(restoring, model, jobs, options: dict[str, Any]) -> int:
    """Restore the jobs under a progress bar on stderr; print notes and failures; return the number of these."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("restoring", total=len(jobs))

        def on_done(outcome) -> None:
            for note in outcome.notes:
                console.print(f"note: {outcome.source}: {note}", style="yellow", markup=False, soft_wrap=True)
            if outcome.error is not None:
                console.print(f"failed: {outcome.source}: {outcome.error}", style="red", markup=False, soft_wrap=True)
            progress.advance(task)

        outcomes = restoring.restore_files(model, jobs, **options, on_done=on_done)
    return sum(outcome.error is not None for outcome in outcomes)


@main.command()
@click.argument("output", type=click.Path(path_type=Path))
@WEIGHTS
@KEY
def export(output, weights, key):
    """Write the weights of a checkpoint to OUTPUT, a .safetensors file.

    What csrc/examples/ reads, a program in C++ that restores photographs without Python.
    """
    from mirage.checkpoint import from_checkpoint, save_checkpoint

    with _reading_weights():
        save_checkpoint(from_checkpoint(weights, key=key), output)
    click.echo(f"wrote {output}")


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object in the place of tables.")
@click.option("--no-check", is_flag=True, help="Only versions, devices and implementations; run no operator.")
@click.option("--gpu", is_flag=True, help="Check and time the operators on the GPU, on larger images, in all dtypes.")
def doctor(as_json, no_check, gpu):
    """Print versions, devices, which implementations run and why, and check every operator against its reference.

    The exit status is 1 if a check fails.
    """
    if gpu:
        _device("cuda")
    import json

    from rich.console import Console

    from mirage import doctor as clinic

    report = clinic.examine(check=not no_check, gpu=gpu)
    if as_json:
        click.echo(json.dumps(report.as_dict(), indent=2))
    else:
        clinic.render(report, Console(width=None if sys.stdout.isatty() else 120))
    sys.exit(0 if report.healthy else 1)


@main.command()
@click.option("-o", "--output", required=True, type=FILE, help="The JSON file to write.")
@click.option("--variant", type=click.Choice(["tiny", "small"]), default="tiny", show_default=True)
@click.option("--size", "sizes", multiple=True, default=["224x224"], show_default=True, metavar="HxW",
              help="Height and width of the images; may be repeated.")  # fmt: skip
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--dtype", "dtypes", multiple=True, default=["bfloat16"], show_default=True,
              type=click.Choice(["float32", "float16", "bfloat16"]), help="May be repeated.")  # fmt: skip
@click.option("--step", is_flag=True, help="Training steps too.")
def tune(output, variant, sizes, batch, dtypes, step):
    """Measure what is faster on this GPU; MIRAGE_TUNING=FILE uses it.

    Warps and pipeline stages of each Triton kernel, and which of Triton and CUDA C++ each operator runs on. Minutes for
    each dtype. Results stay within rounding of those without the file: sums over a program's registers are
    added up in the order of its warps.
    """
    import re

    _device("cuda")
    shapes = []
    for size in sizes:
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", size)
        if match is None:
            raise click.BadParameter(f"expected HxW, such as 224x224, got {size!r}", param_hint="--size")
        shapes.append((batch, 3, int(match[1]), int(match[2])))
    if not output.parent.is_dir():
        raise click.BadParameter(f"no folder {str(output.parent)!r}", param_hint="--output")
    import torch

    from mirage import tune as tuning

    try:
        found, tuner, chooser = tuning.tune(variant, shapes, [getattr(torch, name) for name in dtypes], step)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    found.save(output)
    saved = sum(built_in - best for built_in, best in tuner.times.values())
    total = sum(built_in for built_in, _ in tuner.times.values())
    click.echo(f"{len(tuner.times)} kinds of launches, {len(found.launches)} of them faster otherwise: "
               f"one of each takes {total - saved:.3f} instead of {total:.3f} ms")  # fmt: skip
    click.echo(f"{len(chooser.times)} kinds of calls, {len(found.choices)} of them faster in CUDA C++ than in Triton")
    click.echo(f"wrote {output}; use it with MIRAGE_TUNING={output}")


@main.command()
def version() -> None:
    """Print the versions of this package, PyTorch and Python."""
    import platform

    import torch

    from mirage.doctor import package_version

    click.echo(f"mirage-kernels {package_version()}, torch {torch.__version__}, Python {platform.python_version()}")


def _require(extra: str, *modules: str) -> None:
    """Stop with what to install where one of ``modules`` is missing."""
    import importlib.util

    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise click.ClickException(f"{', '.join(missing)} not installed; try: pip install 'mirage-kernels[{extra}]'")


@contextmanager
def _reading_weights() -> Iterator[None]:
    """Turn what is wrong with a checkpoint into an error of the command, its warnings into lines on stderr."""
    import warnings

    from mirage.checkpoint import CheckpointWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CheckpointWarning)
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            raise click.ClickException(str(error)) from error
    for warning in caught:
        if issubclass(warning.category, CheckpointWarning):
            click.echo(f"Warning: {warning.message}", err=True)
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _device(name: str):
    """The device called ``name``; ``auto`` is the GPU where there is one."""
    import torch

    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else torch.device(name)
    except RuntimeError as error:
        raise click.BadParameter(f"expected auto, cpu or cuda[:N], got {name!r}", param_hint="--device") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise click.BadParameter("no CUDA device is available to PyTorch", param_hint="--device")
    return device


def _print_table(result) -> None:
    from rich.console import Console

    from mirage import table6 as table

    table.render(result, Console(width=None if sys.stdout.isatty() else 120))


if __name__ == "__main__":
    main()
