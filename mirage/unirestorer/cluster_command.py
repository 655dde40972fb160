"""``mirage unirestorer cluster``."""

from __future__ import annotations

from pathlib import Path

import click

from mirage.commands.common import require
from mirage.unirestorer.command_parts import CONFIG, OVERRIDES, SYSTEM, config_of, told
from mirage.wording import counted

__all__ = ["cluster"]


@click.command()
@OVERRIDES
@CONFIG
@SYSTEM
@click.option(
    "--extractor", required=True, help="File of an extractor, or the name of one that comes with the package."
)
@click.option("--samples", default=20000, show_default=True, type=click.IntRange(min=1), help="Of the configuration's "
              "training that are clustered: the first ones.")  # fmt: skip
@click.option("--children", default="4 auto:8", show_default=True, help="Of each group, level by level: a number, a "
              "list such as 3+3+2, or auto:K for K groups in all.")  # fmt: skip
@click.option("--min-samples", default=2, show_default=True, type=click.IntRange(min=1), help="Smaller groups are not "
              "divided.")  # fmt: skip
@click.option("--normalize", is_flag=True, help="Divide embeddings by their norm first.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of k-means.")
@click.option("--plots", is_flag=True, help="Draw the tree (tree.png) and the embeddings by t-SNE (embeddings.png).")
def cluster(overrides: tuple[str, ...], config: str, folder: Path, extractor: str, samples: int, children: str,
            min_samples: int, normalize: bool, seed: int, plots: bool) -> None:  # fmt: skip
    """Embed the first samples of a training, and divide them into a tree by hierarchical k-means.

    The samples are crops of the configuration's pictures as its training would see them; each degradation of a set's
    kind is a task. What is written is tree and extractor; no image is kept, since a sample follows from its number.

    \b
        mirage unirestorer cluster --config unirestorer-tiny data.root=/data --extractor extractor-small --system system
    """
    require("unirestorer", "sklearn", *(["matplotlib"] if plots else []))
    from rich.console import Console
    from rich.progress import Progress

    from mirage.unirestorer.clustering import parse_children
    from mirage.unirestorer.extractors import load_extractor, save_extractor
    from mirage.unirestorer.folder import SystemFolder
    from mirage.unirestorer.samples import data_identity, embed_samples
    from mirage.unirestorer.tree import ExpertTree

    chosen = config_of(config, overrides)
    place = SystemFolder(folder)
    with told():
        plan = parse_children(children)
        found = load_extractor(extractor)
        place.path.mkdir(parents=True, exist_ok=True)
        with Progress(console=Console(stderr=True), transient=True) as progress:
            bar = progress.add_task("embedding", total=samples)
            embeddings, tasks = embed_samples(
                chosen, samples, found, cache=place.path / "embeddings.safetensors",
                on_step=lambda done, total: progress.update(bar, completed=done),
            )  # fmt: skip
        tree = ExpertTree.fit(embeddings, plan, tasks, seed=seed, min_samples=min_samples, normalize=normalize)
        if place.tree_file.is_file() and place.tree().fingerprint != tree.fingerprint and place.experts_folder.is_dir():
            raise ValueError(f"{folder}: has experts of another tree; name another folder")
        save_extractor(found, place.extractor_file)
        place.write_samples(data_identity(chosen), samples, children=children, seed=seed)
        tree.save(place.tree_file)
        if plots:
            from mirage.unirestorer.draw import write_plots

            write_plots(tree, embeddings, tasks, place.path)
    click.echo(f"{tree!r} of {counted(samples, 'sample')}", err=True)
    for node, tasks_of_node in zip(tree.nodes, tree.node_tasks(), strict=True):
        click.echo(f"{'  ' * node.level}{node.id:3d}  {node.size:6d}  {' '.join(tasks_of_node)}")
