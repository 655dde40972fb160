"""``mirage unirestorer describe``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from mirage.commands.common import FOLDER
from mirage.unirestorer.command_parts import told

__all__ = ["describe"]


@click.command()
@click.argument("folder", type=FOLDER)
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def describe(folder: Path, as_json: bool) -> None:
    """Print the tree in a folder: each node's samples and tasks, which experts are trained, how the router was used."""
    from mirage.unirestorer.folder import SystemFolder

    with told():
        found = SystemFolder(folder).describe()
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    levels = ", ".join(map(str, found["levels"]))
    click.echo(f"levels {{{levels}}}, tasks: {', '.join(found['tasks']) or 'not known'}")
    for part in ("extractor", "router"):
        click.echo(f"{part}: {'there' if found[part] else 'not there yet'}")
    usage = found["usage"]
    click.echo("node  samples  expert  used    tasks")
    for node in found["nodes"]:
        click.echo(_line(node, usage))


def _line(node: dict[str, Any], usage: dict[str, float]) -> str:
    used = usage.get(f"validation_{node['node']}", usage.get(f"train_{node['node']}"))
    share = "    -" if used is None else f"{used:5.1%}"
    tasks = " ".join(f"{name} {count / max(1, node['samples']):.0%}" for name, count in list(node["tasks"].items())[:6])
    there = "yes" if node["expert"] else "no"
    return f"{node['node']:4d}  {node['samples']:7d}  {there:6s}  {share}  {'  ' * node['level']}{tasks}".rstrip()
