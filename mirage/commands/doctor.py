"""``mirage doctor``."""

from __future__ import annotations

import sys

import click

from mirage.commands.common import device_named

__all__ = ["doctor"]


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object in the place of tables.")
@click.option("--no-check", is_flag=True, help="Only versions, devices and implementations; run no operator.")
@click.option("--gpu", is_flag=True, help="Check and time the operators on the GPU, on larger images, in all dtypes.")
def doctor(as_json, no_check, gpu):
    """Print versions, devices, which implementations run and why, and check every operator against its reference.

    The exit status is 1 if a check fails.
    """
    if gpu:
        device_named("cuda")
    import json

    from rich.console import Console

    from mirage import doctor as clinic

    report = clinic.examine(check=not no_check, gpu=gpu)
    if as_json:
        click.echo(json.dumps(report.as_dict(), indent=2))
    else:
        clinic.render(report, Console(width=None if sys.stdout.isatty() else 120))
    sys.exit(0 if report.healthy else 1)
