"""A small Table 1 of GRIDS with our networks: ``python -m benchmarks.grids_table1 --data DIR --similarity FILE``.

Single-task networks, one for all, and the groups that a search finds, each trained for the same number of steps on
BSD400 with the eleven degradations drawn as it goes, and measured on the middles of CBSD68, degraded once and for all.
Every network is kept in a folder, so the same command goes on where it was stopped, and other values of --delta use
what is there. Writes ``table1.md``, ``table.json`` (every P) and, for each delta, ``groups-DELTA.json``. With --known
the search trains nothing: a group that has no network yet counts as infeasible.

The search is checked: on the table that was measured, the answer of the algorithm (without a ranking) must have as many
groups as the best of all partitions into feasible groups of that table, and be one of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mirage.grids import (
    CachedPerformance,
    Grouping,
    MeasureGroup,
    Performance,
    TrainAndMeasure,
    TrainGroup,
    Workers,
    delta_p,
    enumerate_groupings,
    group_name,
    rank_groups,
    search_groups,
    write_performance,
)
from mirage.grids.groups import is_feasible
from mirage.grids.search_command import read_similarities
from mirage.grids.training import psnr
from mirage.train import load_config
from mirage.wording import counted

GROUPS_OF_THE_PAPER = ("GB MB RL", "SR RI DB", "JP PO IN", "GN SP")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    overrides = [
        f"data.root={options.data}", f"model.arguments.dim={options.dim}", f"schedule.steps={options.steps}",
        *options.override,
    ]  # fmt: skip
    if options.threads:
        overrides.append(f"trainer.threads={options.threads}")
    train = TrainGroup(load_config(options.config, overrides))
    kinds = tuple(train.kinds.items())
    measure = MeasureGroup(str(options.data / "CBSD68"), options.crop, options.limit, kinds=kinds)
    workers = Workers(options.workers, options.engine)
    performance = TrainAndMeasure(
        options.folder / "trainings", train, measure, workers=workers, on_done=lambda name: say(f"{name} is done")
    )
    names = train.degradations
    everything = frozenset(names)
    wanted = [frozenset([name]) for name in names] + [everything]
    if options.paper_groups:
        wanted += [frozenset(text.split()) for text in GROUPS_OF_THE_PAPER]
    more = "" if options.known else ", then those that the search asks for"
    say(f"{len(wanted)} networks of {options.steps} steps each{more}")
    performance.measure(wanted)
    found = search(table_of(performance) if options.known else performance, names, options)
    measured = table_of(performance)
    write_performance(measured, options.folder / "table.json", names)
    checks = [check(measured, names, delta) for delta in options.delta]
    inputs = {name: float(np.mean([psnr(clean, seen) for seen, clean in measure.pairs(name)])) for name in names}
    text = page(measured, names, inputs, found, checks, options)
    (options.folder / "table1.md").write_text(text, encoding="utf-8")
    print(text)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with BSD400 and CBSD68")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--similarity", type=Path, help="of mirage grids similarity, .json or .csv, for the search")
    how.add_argument("--known", action="store_true", help="search among these networks, and train no others")
    parser.add_argument("--folder", type=Path, default=Path("out/grids-table1"))
    parser.add_argument("--config", default="grids-tiny")
    parser.add_argument("--dim", type=int, default=12)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--delta", type=float, action="append", help="dB; repeatable (default 0.7)")
    parser.add_argument("--crop", type=int, default=128, help="of the test pictures")
    parser.add_argument("--limit", type=int, help="test pictures")
    parser.add_argument("--paper-groups", action="store_true", help="measure the paper's four groups too")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--engine", default="local", choices=("local", "ray"))
    parser.add_argument("--threads", type=int, help="of each training")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="of the configuration")
    options = parser.parse_args(arguments)
    options.delta = options.delta or [0.7]
    return options


def table_of(performance: TrainAndMeasure) -> CachedPerformance:
    """What has been measured so far."""
    known = list(performance.known())
    return CachedPerformance(dict(zip(known, performance.measure(known), strict=True)))


def search(performance: Performance, names: Sequence[str], options: argparse.Namespace) -> list[Grouping]:
    """The groups for each delta, along the ranking of the similarities where there are some."""
    ranking = None
    if options.similarity is not None:
        all_names, matrix = read_similarities(options.similarity)
        places = [all_names.index(name) for name in names]
        ranking = rank_groups(names, matrix[np.ix_(places, places)])
    found = []
    for delta in options.delta:
        found.append(search_groups(names, performance, delta, ranking, on_step=lambda step: say(str(step))))
        found[-1].save(options.folder / f"groups-{delta:g}.json")
    return found


def check(measured: CachedPerformance, names: Sequence[str], delta: float) -> tuple[int, int, int]:
    """The algorithm beside brute force over the groups of a table.

    Returns:
        Feasible groups of several, the fewest groups, and how many partitions have as few.

    Raises:
        AssertionError: the two disagree.
    """
    single = {name: measured.values[frozenset([name])][name] for name in names}
    feasible = [group for group, found in measured.values.items() if is_feasible(delta_p(group, found, single), delta)]
    partitions = list(enumerate_groupings([*feasible, *([name] for name in names)], names))
    fewest = min(map(len, partitions))
    answer = {frozenset(group) for group in search_groups(names, measured, delta).groups}
    best = [set(parts) for parts in partitions if len(parts) == fewest]
    assert answer in best, f"delta {delta}: the search has {answer}, brute force {best[0]}, {len(best)} such"
    return sum(len(group) > 1 for group in feasible), fewest, len(best)


def page(
    measured: CachedPerformance, names: Sequence[str], inputs: dict[str, float], found: Sequence[Grouping],
    checks: Sequence[tuple[int, int, int]], options: argparse.Namespace,
) -> str:  # fmt: skip
    """The results in Markdown."""
    single = {name: measured.values[frozenset([name])][name] for name in names}
    shared = measured.values[frozenset(names)]
    rows = [("degraded", inputs), ("single-task", single), ("one for all", shared)]
    if options.paper_groups:
        rows.append(("groups of the paper", of_groups(measured, [text.split() for text in GROUPS_OF_THE_PAPER])))
    rows += [(f"groups, delta {each.delta:g}", of_groups(measured, each.groups)) for each in found]
    lines = [
        f"MIRAGE, dim {options.dim}: {options.steps} steps for each network (`{options.config}`), PSNR in dB of RGB, "
        f"{options.limit or 'all'} pictures of CBSD68, their middles of {options.crop} pixels.", "",
        f"    {command(options)}", "",
        f"| network | {' | '.join(names)} | average |", f"|---|{'---:|' * (len(names) + 1)}",
    ]  # fmt: skip
    for label, row in rows:
        values = [f"{row[name]:.2f}" for name in names]
        lines.append(f"| {label} | {' | '.join(values)} | {np.mean([row[name] for name in names]):.2f} |")
    for each, (feasible, fewest, count) in zip(found, checks, strict=True):
        tried = ", ".join(f"{m} {'yes' if passed else 'no'}" for m, passed in each.bisection)
        groups = "; ".join(f"{' '.join(group)} ({each.drops[group_name(group, names)]:+.2f})" for group in each.groups)
        head = f"Delta {each.delta:g} dB{', of these networks alone' if options.known else ''}"
        lines += [
            "",
            f"{head}: {counted(len(each.groups), 'group')}, compression {each.compression:.1%} (in "
            f"brackets what the member that loses most loses, in dB): {groups}. "
            f"{'' if options.known else bisected(each)}Bisection over the number of groups: {tried}. Over "
            f"all {len(measured.values)} networks that were measured, {feasible} groups of several are feasible; brute "
            f"force finds {counted(fewest, 'group')} at least, in {counted(count, 'way')}, and the search on the same "
            f"table one of them.",
        ]  # fmt: skip
    worst = min(names, key=lambda name: shared[name] - single[name])
    lines += ["", f"One for all against single-task: {np.mean([shared[n] - single[n] for n in names]):+.2f} dB on "
              f"average, {shared[worst] - single[worst]:+.2f} at worst ({worst})."]  # fmt: skip
    return "\n".join(lines) + "\n"


def bisected(found: Grouping) -> str:
    """What the search asked for beside the groups of its answer, as a sentence before another."""
    asked = sum(step.stage != "cover" for step in found.trace)
    return (
        f"Bisection over sizes and ranks trained or looked up {counted(asked, 'group')}, of up to "
        f"{counted(found.largest, 'member')}. "
    )


def of_groups(measured: CachedPerformance, groups: Sequence[Sequence[str]]) -> dict[str, float]:
    """P of each degradation by its group's network."""
    return {name: measured.values[frozenset(group)][name] for group in groups for name in group}


def command(options: argparse.Namespace) -> str:
    more = "".join(f" --delta {delta:g}" for delta in options.delta) + " --paper-groups" * options.paper_groups
    more += "".join(f" --override {each}" for each in options.override)
    source = "--known" if options.known else "--similarity similarity.json"
    return (
        f"python -m benchmarks.grids_table1 --data DIR {source} --dim {options.dim} "
        f"--steps {options.steps} --crop {options.crop}{f' --limit {options.limit}' if options.limit else ''}{more}"
    )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        say("stopped; what was trained is kept, and the same command goes on from here")
        sys.exit(130)
