"""``mirage restore --engine ray``: the options that the command gets, and what it does with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

__all__ = ["ray_options", "restore_with_ray"]

Command = TypeVar("Command", bound=Callable[..., Any])

OPTIONS = (
    click.option(
        "--engine",
        default="local",
        show_default=True,
        type=click.Choice(["local", "ray"]),
        help="This process, or workers on a cluster of Ray, with inputs and outputs anywhere that fsspec reaches.",
    ),
    click.option("--address", help="Ray: the cluster, such as auto.  [default: RAY_ADDRESS, else this machine]"),
    click.option(
        "--workers",
        type=click.IntRange(min=1),
        help="Ray: how many.  [default: one a GPU; without GPUs one for each four CPUs of a machine]",
    ),
    click.option("--manifest", help="Ray: folder of the manifest.  [default: OUT/manifest.parquet]"),
    click.option("--retry-failed", is_flag=True, help="Ray: try those again that failed in an earlier run."),
)


def ray_options(command: Command) -> Command:
    """Add the options of this engine to a command."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def restore_with_ray(inputs: Sequence[str], out: str, weights: Any, **options: Any) -> int:
    """Run the job under a progress bar on stderr; print failures as they come, and a summary.

    Args:
        inputs, out, weights, options: as for `mirage.distributed.restore`.

    Returns:
        The exit status: 1 if a file failed in this run, else 0.

    Raises:
        click.ClickException: what `mirage.distributed.restore` raises of arguments and places.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from mirage import distributed

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("listing", total=None)

        def on_listed(listed: int, left: int) -> None:
            progress.update(task, description="restoring", total=left, completed=0)

        def on_done(record: distributed.Record) -> None:
            for note in record.notes:
                console.print(f"note: {record.input}: {note}", style="yellow", markup=False, soft_wrap=True)
            if record.error is not None:
                console.print(f"failed: {record.input}: {record.error}", style="red", markup=False, soft_wrap=True)
            progress.advance(task)

        try:
            done = distributed.restore(inputs, out, weights, on_listed=on_listed, on_done=on_done, **options)
        except (ImportError, OSError, ValueError) as error:
            raise click.ClickException(str(error)) from error
    _report(done, out)
    return 1 if done.failed else 0


def _report(done: Any, out: str) -> None:
    if done.skipped:
        more = f", and {done.skipped - len(done.skipped_examples)} more" * (done.skipped > len(done.skipped_examples))
        click.echo(f"skipped {done.skipped} that are no images: {', '.join(done.skipped_examples)}{more}", err=True)
    parts = [
        f"restored {done.restored} of {done.listed} into {out}",
        f"{done.failed} failed" if done.failed else "",
        f"{done.finished_before + done.present} were there before" if done.finished_before + done.present else "",
        f"{done.failed_before} failed before (--retry-failed tries them again)" if done.failed_before else "",
    ]
    click.echo("; ".join(filter(None, parts)))
    click.echo(f"manifest: {done.manifest}")
