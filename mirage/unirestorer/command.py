"""``mirage unirestorer``: the group of commands; each lies in a module of its own beside this one."""

from __future__ import annotations

import click

from mirage.unirestorer.cluster_command import cluster
from mirage.unirestorer.describe_command import describe
from mirage.unirestorer.evaluate_command import evaluate
from mirage.unirestorer.experts_command import experts
from mirage.unirestorer.extract_command import extract, retrieval
from mirage.unirestorer.restore_command import restore
from mirage.unirestorer.router_command import router

__all__ = ["unirestorer"]


@click.group()
def unirestorer() -> None:
    """A tree of experts for clusters of degradations, and a router that picks one for each image (UniRestorer).

    extract trains what tells degradations apart; cluster, experts and router fill one folder, stage by stage;
    restore, evaluate and describe read it.
    """


unirestorer.add_command(cluster)
unirestorer.add_command(describe)
unirestorer.add_command(evaluate)
unirestorer.add_command(experts)
unirestorer.add_command(extract)
unirestorer.add_command(restore)
unirestorer.add_command(retrieval)
unirestorer.add_command(router)
