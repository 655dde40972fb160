"""A small UniRestorer of our own: ``python -m benchmarks.unirestorer_small --data DIR --extractor FILE``.

A tree of the first samples of `unirestorer-tiny` (GRIDS's eleven degradations and CDD11's, on BSD400), an expert of a
small MIRAGE for each node, a router; measured on the middles of CBSD68, degraded once and for all, and of Rain100L's
test pictures: in distribution, and by degradations that nothing was trained on. Every image is restored by every
expert, so that the router stands beside the root, always the finest level, the best leaf and the best node (which know
the clean picture), and beside itself with the task named; with ``--confidence`` also beside the level that follows from
the probabilities of the leaves.

Every stage goes on where it was stopped. Writes into ``--folder``: the system, ``tree.png``, ``embeddings.png``,
``measured/NAME.json`` (every image, every expert), ``summary.json`` and ``results.md``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mirage.grids import MeasureGroup, Workers
from mirage.train import Config, Interrupted, load_config
from mirage.unirestorer import (
    ExpertTrainings,
    ExpertTree,
    LoRASettings,
    RouterRun,
    RouterSettings,
    SystemFolder,
    TrainExpert,
    UniRestorer,
    embed_samples,
    embedding_map,
    load_extractor,
    save_extractor,
    save_router,
    tree_figure,
    write_figure,
)
from mirage.unirestorer.clustering import parse_children
from mirage.unirestorer.confidence import check_confidence
from mirage.unirestorer.evaluation import measured_choices, summarise_choices
from mirage.unirestorer.expert_training import parse_steps
from mirage.unirestorer.samples import data_identity, one_set_a_kind
from mirage.whole_files import write_whole

HELD_OUT = ("GB+GN", "MB+JP", "DB+PO", "SR+JP", "RI+SP", "haze+GN", "rain+MB")
"""Compositions that are not trained on, of degradations that are."""

RAIN = "Rain100L"


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    own = [f"model.arguments.dim={options.dim}", *options.override]
    config = load_config(options.config, [*overrides(options, options.steps, options.batch, options.crop), *own])
    place = SystemFolder(options.folder / "system")
    make_tree(place, config, options)
    make_experts(place, config, options)
    make_router(place, options)
    measured = measure_all(place.system(device=options.device), config, options)
    summary = summarise_choices(place.tree(), measured, tasks_of(config), options.confidence)
    write_whole(options.folder / "summary.json", (json.dumps(summary, indent=1) + "\n").encode("utf-8"))
    text = page(place.tree(), summary, options)
    write_whole(options.folder / "results.md", text.encode("utf-8"))
    print(text)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with BSD400, CBSD68 and Rain100L_test")
    parser.add_argument("--extractor", default="extractor-small", help="file or name")
    parser.add_argument("--folder", type=Path, default=Path("out/unirestorer-small"))
    parser.add_argument("--config", default="unirestorer-tiny")
    parser.add_argument("--dim", type=int, default=12)
    parser.add_argument("--samples", type=int, default=8000, help="of the tree")
    parser.add_argument("--children", default="4 auto:8")
    parser.add_argument("--steps", type=int, default=4000, help="of each expert")
    parser.add_argument("--level-steps", help="of each level's experts, from the root on, in the place of --steps")
    parser.add_argument("--batch", type=int, default=4, help="of experts")
    parser.add_argument("--crop", type=int, default=64, help="of samples")
    parser.add_argument("--lora", type=int, help="rank: experts that add to the root's")
    parser.add_argument("--router-steps", type=int, default=4000)
    parser.add_argument("--router-crop", type=int, default=96)
    parser.add_argument("--router-batch", type=int, default=8)
    parser.add_argument("--router-lr", type=float, default=1e-3)
    parser.add_argument("--objective", default="gate", choices=("gate", "expected"), help="of the router")
    parser.add_argument("--balance", default="levels", choices=("levels", "leaves", "both"))
    parser.add_argument("--balance-weight", type=float, help="default: of the objective")
    parser.add_argument("--centre-weight", type=float, default=0.1)
    parser.add_argument("--test-crop", type=int, default=128, help="middles of the test pictures")
    parser.add_argument("--confidence", type=float, help="the level by the leaves' probabilities, in (0, 1]")
    parser.add_argument("--limit", type=int, help="test pictures of each degradation")
    parser.add_argument("--workers", type=int, default=1, help="experts trained at a time")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="of the experts")
    options = parser.parse_args(arguments)
    check_confidence(options.confidence)  # before anything is trained
    if options.balance_weight is None:
        options.balance_weight = RouterSettings(objective=options.objective).balance_weight
    return options


def overrides(options: argparse.Namespace, steps: int, batch: int, crop: int) -> list[str]:
    chosen = [f"data.root={options.data}", f"schedule.steps={steps}", f"data.batch={batch}", f"data.crop={crop}"]
    if options.threads:
        chosen.append(f"trainer.threads={options.threads}")
    if options.device == "cpu":
        chosen.append("trainer.accelerator=cpu")
    return chosen


def tasks_of(config: Config) -> list[str]:
    return [one.name for one in one_set_a_kind(config.data).sets]


def steps_told(options: argparse.Namespace) -> str:
    by_level = options.level_steps
    return f"{options.steps} steps each" if by_level is None else f"{by_level} steps by level"


# --- the stages


def make_tree(place: SystemFolder, config: Config, options: argparse.Namespace) -> None:
    identity = data_identity(config)
    if place.tree_file.is_file() and place.samples_file.is_file():
        if place.samples()["data"] != identity:
            raise SystemExit(f"{place.path}: holds a tree of other samples; name another --folder")
        return
    extractor = load_extractor(options.extractor)
    say(f"embedding {options.samples} samples")
    cache = place.path / "embeddings.safetensors"
    embeddings, tasks = embed_samples(config, options.samples, extractor, cache=cache)
    tree = ExpertTree.fit(embeddings, parse_children(options.children), tasks)
    place.path.mkdir(parents=True, exist_ok=True)
    save_extractor(extractor, place.extractor_file)
    place.write_samples(identity, options.samples, children=options.children)
    write_figure(tree_figure(tree), options.folder / "tree.png")
    shown = np.linspace(0, len(tasks) - 1, min(len(tasks), 1500)).astype(int)
    leaves = [str(leaf) for leaf in tree.assign(embeddings[shown]).tolist()]
    labels = {"degradation": [tasks[i] for i in shown], "leaf": leaves}
    write_figure(embedding_map(embeddings[shown], labels), options.folder / "embeddings.png")
    tree.save(place.tree_file)
    say(f"{tree!r}")


def make_experts(place: SystemFolder, config: Config, options: argparse.Namespace) -> None:
    lora = None if options.lora is None else LoRASettings(options.lora, 16.0)
    level_steps = None if options.level_steps is None else parse_steps(options.level_steps)
    train = TrainExpert(config, lora, level_steps=level_steps)
    trainings = ExpertTrainings(
        place.experts_folder, place.tree(), train, workers=Workers(options.workers),
        on_done=lambda name: say(f"expert {name} is done"),
    )  # fmt: skip
    say(f"{len(trainings.missing)} experts of {len(place.tree())} to train, {steps_told(options)}")
    trainings.run()


def make_router(place: SystemFolder, options: argparse.Namespace) -> None:
    if place.router_file.is_file():
        return
    chosen = overrides(options, options.router_steps, options.router_batch, options.router_crop)
    config = load_config("unirestorer-router", [*chosen, f"optimizer.lr={options.router_lr}"])
    config = dataclasses.replace(config, output=dataclasses.replace(config.output, folder=str(place.router_run)))
    weights = (options.centre_weight, options.balance_weight)
    settings = RouterSettings("affine", *weights, options.balance, options.objective)
    run = RouterRun(config, place.extractor(), place.tree(), place.experts(device=options.device), settings)
    say(f"router from step {run.step} to {options.router_steps}")
    run.train()
    save_router(run.router, place.router_file, settings)


# --- measuring


def measure_all(system: UniRestorer, config: Config, options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """By degradation a record of each image; those that are there are read."""
    folder = options.folder / "measured"
    folder.mkdir(parents=True, exist_ok=True)
    kinds = {one.name: one.kind for one in one_set_a_kind(config.data).sets} | {name: name for name in HELD_OUT}
    test = MeasureGroup(str(options.data / "CBSD68"), options.test_crop, options.limit, kinds=tuple(kinds.items()))
    measured = {}
    for name in (*kinds, RAIN):
        pairs = rain_pairs(options) if name == RAIN else test.pairs(name)
        task = "RA" if name == RAIN else name
        measured[name] = measured_choices(system, pairs, task, folder / f"{name}.json", test.identity)
        say(f"{name}: {len(measured[name])} images")
    return measured


def rain_pairs(options: argparse.Namespace) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    from mirage.train.data.pictures import Picture, Reader, files_in

    read, side = Reader(), options.test_crop
    folder = options.data / "Rain100L_test"
    for file in files_in(folder / "input")[: options.limit]:
        both = [read(Picture(str(path), str(path))) for path in (file, folder / "target" / file.name)]
        top, left = ((length - side) // 2 for length in both[0].shape[:2])
        seen, clean = (each[top : top + side, left : left + side].astype(np.float32) / 255 for each in both)
        yield seen, clean


# --- what it shows


def page(tree: ExpertTree, summary: dict[str, Any], options: argparse.Namespace) -> str:
    """The results in Markdown."""
    ways = summary["ways"]
    experts = f"LoRA of rank {options.lora}" if options.lora else "whole"
    lines = [
        f"{tree!r} of {tree.nodes[0].size} samples of {options.crop} pixels; MIRAGE, dim {options.dim}, experts "
        f"{experts}, {steps_told(options)} (`{options.config}`), router {options.router_steps} steps. PSNR in dB "
        f"of RGB, middles of {options.test_crop} pixels.", "", f"    {command(options)}", "",
        f"| degradation | images | {' | '.join(ways)} | levels 0.. |", f"|---|---:|{'---:|' * len(ways)}---|",
    ]  # fmt: skip
    for name, row in summary["degradations"].items():
        lines.append(line(name if row["in_distribution"] else f"{name} (held out)", row, ways))
    titles = {"in": "**mean, in distribution**", "out": "**mean, held out**"}
    lines += [line(title, summary["means"][part], ways) for part, title in titles.items()]
    c = summary["coarser"]
    lines += [
        "", f"Level, mean over images: {c['mean_level']['in']:.2f} of {c['images']['in']} in distribution, "
        f"{c['mean_level']['out']:.2f} of {c['images']['out']} held out; above the leaves "
        f"{c['above_leaves']['in']:.1%} and {c['above_leaves']['out']:.1%}; expected level "
        f"{c['mean_expected_level']['in']:.3f} and {c['mean_expected_level']['out']:.3f}. "
        f"Held-out images go to coarser levels (Mann-Whitney, one-sided): "
        f"p = {c['p_level']:.2g} by level, {c['p_expected_level']:.2g} by expected level, "
        f"{c['p_level_by_degradation']:.2g} by the mean levels of degradations.",
        "", f"Images by expert: {summary['experts']}.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def line(name: str, row: dict[str, Any], ways: Sequence[str]) -> str:
    levels = " ".join(f"{share:.0%}" for share in row["levels"])
    return f"| {name} | {row['images']} | {' | '.join(f'{row[way]:.2f}' for way in ways)} | {levels} |"


def command(options: argparse.Namespace) -> str:
    names = ("dim", "samples", "steps", "batch", "crop", "router_steps", "router_crop", "router_batch", "router_lr",
             "objective", "balance", "balance_weight", "centre_weight", "test_crop")  # fmt: skip
    text = " ".join(f"--{name.replace('_', '-')} {getattr(options, name)}" for name in names)
    if options.level_steps is not None:
        text += f' --level-steps "{options.level_steps}"'
    where_given = ("lora", "limit", "confidence")
    text += "".join(f" --{name} {getattr(options, name)}" for name in where_given if getattr(options, name) is not None)
    text += "".join(f" --override '{each}'" for each in options.override)
    return (
        f"python -m benchmarks.unirestorer_small --data DIR --extractor FILE --config {options.config} "
        f'--children "{options.children}" {text}'
    )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, Interrupted):
        say("stopped; what was reached is kept, and the same command goes on from here")
        sys.exit(130)
