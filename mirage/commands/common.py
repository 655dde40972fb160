"""What several commands share: options, and errors of the command line in the place of tracebacks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from mirage.extras import not_there

__all__ = [
    "FILE",
    "FOLDER",
    "KEY",
    "STOPPED",
    "THERE",
    "WEIGHTS",
    "device_named",
    "reading_weights",
    "require",
    "stopping",
]

STOPPED = 130
"""Exit status after Ctrl-C, as shells have it."""

FILE = click.Path(dir_okay=False, path_type=Path)
THERE = click.Path(exists=True, dir_okay=False, path_type=Path)
"""A file that is read."""
FOLDER = click.Path(file_okay=False, path_type=Path)
WEIGHTS = click.option(
    "--weights",
    required=True,
    type=FILE,
    help="Checkpoint (.ckpt, .pth, .safetensors), or the name of weights that come with the package.",
)
KEY = click.option("--key", help="Which network, where the file holds several: params, state_dict_ema, net, ...")


def require(extra: str, *modules: str) -> None:
    """Stop with what to install where one of ``modules``, which ``extra`` brings, is missing."""
    missing = not_there(extra, *modules)
    if missing is not None:
        raise click.ClickException(missing)


@contextmanager
def reading_weights() -> Iterator[None]:
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


@contextmanager
def stopping() -> Iterator[None]:
    """A request to end from the system (SIGTERM) is what Ctrl-C is, so that files are cleared up."""
    import signal
    import threading

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def device_named(name: str):
    """The device called ``name``; ``auto`` is the GPU where there is one."""
    import torch

    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else torch.device(name)
    except RuntimeError as error:
        raise click.BadParameter(f"expected auto, cpu or cuda[:N], got {name!r}", param_hint="--device") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise click.BadParameter("no CUDA device is available to PyTorch", param_hint="--device")
    return device
