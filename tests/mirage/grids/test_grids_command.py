"""``mirage grids search``, ``train`` and ``restore`` from the command line."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from click.testing import CliRunner
from train_cases import SMALL, write_pictures

from mirage.cli import main
from mirage.grids import GGD, load_grouping, read_performance

CONFIG = """
model: {size: tiny, drop_path: 0.0, spd: false, arguments: ARGUMENTS}
optimizer: {lr: 2e-3}
schedule: {steps: 2}
data:
  sets: [{name: grids, clean: clean, kind: [GB, GN, SP]}]
  crop: 16
  batch: 2
trainer: {accelerator: cpu, threads: 1}
output: {checkpoint_minutes: null, log_steps: 1}
"""


def run(*arguments):
    return CliRunner().invoke(main, ["grids", *map(str, arguments)])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("grids")
    write_pictures(root / "clean")
    write_pictures(root / "test", count=2, seed=1, size=(40, 48))
    arguments = {name: value for name, value in SMALL.items() if not name.startswith("spd")}
    (root / "config.yaml").write_text(CONFIG.replace("ARGUMENTS", json.dumps(arguments)))
    return root


def similarities(root):
    """What ``mirage grids similarity`` writes, of a descriptor that is a tiny network."""
    import torch

    from mirage.grids.matrix import SimilarityMatrix
    from mirage.networks import create

    torch.manual_seed(0)
    network = create("srresnet", upscale=2, num_blocks=1, dim=4)
    torch.save(network.state_dict(), root / "descriptor.pth")
    ggds = {"GB": GGD(0.5, 0.1), "GN": GGD(1.5, 1.0), "SP": GGD(1.2, 1.1)}
    settings = {"patches": 12, "components": 4, "patch": 8}
    SimilarityMatrix(ggds, settings).save(root / "similarity.json")
    SimilarityMatrix(ggds, settings).save(root / "similarity.csv")


# --- search


def test_search_of_the_published_table(tmp_path):
    result = run("search", "--table", "published:restormer", "-o", tmp_path / "groups.json",
                 "--write-table", tmp_path / "table.csv")  # fmt: skip
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    for expected in ("at most 6 groups yes", "at most 3 groups no", "at most 5 groups yes", "at most 4 groups yes",
                     "GB MB RL 0.68", "SR RI DB 0.51", "JP PO IN -0.05", "GN SP -0.07", "compression 63.6%",
                     "28 of 2047 groups are known"):  # fmt: skip
        assert expected in text, expected
    assert load_grouping(tmp_path / "groups.json").groups[0] == ("GB", "MB", "RL")
    again = run("search", "--table", tmp_path / "table.csv", "--delta", "0.5")
    assert "7 groups of 11" in again.output, again.output
    some = run("search", "--table", "published:restormer", "--degradations", "GN,SP")
    assert "1 group of 2" in some.output and "compression 50.0%" in some.output


def test_search_along_a_ranking(tmp_path):
    names = list(read_performance("published:restormer").degradations)
    matrix = np.random.default_rng(0).uniform(2, 4, (11, 11))
    rows = [["", *names], *([name, *row] for name, row in zip(names, matrix, strict=True))]
    with open(tmp_path / "s.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    result = run("search", "--table", "published:restormer", "--similarity", tmp_path / "s.csv")
    assert result.exit_code == 0, result.output
    assert "the most alike group of 6" in result.output and "counts as infeasible" in result.output
    assert "11 groups of 11" in result.output  # none of the groups that the ranking asks for is in the table


@pytest.mark.parametrize("arguments, sentence", [
    (["search"], "expected one of --table and --config"),
    (["search", "--table", "a", "--config", "b"], "expected one of --table and --config"),
    (["search", "--table", "published:restormer", "a=1"], "KEY=VALUE goes with --config, got a=1"),
    (["search", "--table", "published:x"], "network: expected one of restormer, srresnet, got 'x'"),
    (["search", "--table", "none.json"], "--table: no file 'none.json'"),
    (["search", "--table", "published:restormer", "--degradations", "GB,XX"], "degradations: published:restormer has"),
    (["search", "--table", "published:restormer", "--similarity", "none.csv"], "'none.csv' does not exist"),
    (["search", "--config", "grids-tiny"], "--config needs --test"),
    (["search", "--config", "none", "--test", "."], "no configuration at 'none'"),
    (["search", "--config", "denoise-tiny", "--test", "."], "expected a set with a kind"),
    (["train", "--config", "grids-tiny", "--similarity", "s.json", "-o", "x"], "expected one of --groups and --group"),
    (["train", "--config", "grids-tiny", "--group", "GB", "--similarity", "none.json", "-o", "x"],
     "'none.json' does not exist"),
    (["restore", "in.png", "--groups", "none", "-o", "x"], "no groups of restorers in 'none': it has no groups.json"),
])  # fmt: skip
def test_what_is_wrong_is_told(arguments, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.json").touch()
    result = run(*arguments)
    assert result.exit_code in (1, 2)
    assert sentence in " ".join(result.output.split()), result.output
    assert "Traceback" not in result.output


def test_help_shows_each_example_on_a_line_of_its_own():
    lines = [line.strip() for line in run("search", "--help").output.splitlines()]
    assert "mirage grids search --table published:restormer" in lines


@pytest.mark.parametrize("text, sentence", [
    ("", "expected a row and a column for each degradation"),
    (",GB,MB\nMB,0,1\nGB,1,0\n", "in the same order"),
    (",GB,MB\nGB,0,1\nMB,1\n", "not readable as similarities"),
    (",GB,MB\nGB,0,x\nMB,1,0\n", "could not convert string to float"),
    (",GB,MB\nGB,0,nan\nMB,1,0\n", "matrix: expected finite numbers, got nan at GB, MB"),
])  # fmt: skip
def test_what_is_wrong_with_similarities_is_told(text, sentence, tmp_path):
    (tmp_path / "s.csv").write_text(text)
    result = run("search", "--table", "published:restormer", "--similarity", tmp_path / "s.csv")
    assert result.exit_code == 1 and sentence in " ".join(result.output.split()), result.output


# --- train and restore


def test_from_search_to_restored_files(root):
    similarities(root)
    common = ["--config", root / "config.yaml", "--folder", root / "trainings", "--test", root / "test", "--crop", 16,
              "--device", "cpu"]  # fmt: skip
    searched = run("search", f"data.root={root}", *common, "--similarity", root / "similarity.json", "--delta", 100,
                   "-o", root / "groups.json", "--write-table", root / "table.json")  # fmt: skip
    assert searched.exit_code == 0, searched.output
    assert "1 group of 3" in searched.output and "trainings: 3 single" in searched.output
    assert len(read_performance(root / "table.json").values) == 7  # all: the first pair, the triple, then the others
    again = run("search", f"data.root={root}", *common, "--similarity", root / "similarity.csv", "--delta", 100)
    assert "trainings: 0 single, 0 prepare, 0 verify" in again.output, again.output

    out = root / "networks"
    trained = run("train", f"data.root={root}", *common, "--group", "GB", "--group", "SP GN", "--similarity",
                  root / "similarity.json", "--weights", root / "descriptor.pth", "-o", out)  # fmt: skip
    assert trained.exit_code == 0, trained.output
    assert "GN+SP" in trained.output and "dB" in trained.output
    assert {path.name for path in out.iterdir()} == {
        "GB.safetensors", "GN+SP.safetensors", "descriptor.safetensors", "groups.json",
    }  # fmt: skip

    arguments = ["restore", root / "test", "--groups", out, "-o", root / "restored", "--device", "cpu"]
    restored = run(*arguments)
    assert restored.exit_code == 0, restored.output
    lines = [line for line in restored.output.splitlines() if ".png" in line]
    assert len(lines) == 2 and all(line.split()[1] in ("GB", "GN+SP") for line in lines)
    assert all(float(line.split()[2]) > 4 and "foreign" in line for line in lines)  # made-up parameters: far from all
    assert (root / "restored" / "groups.csv").exists() and len(list((root / "restored").glob("*.png"))) == 2
    again = run(*arguments)
    assert again.exit_code == 0 and again.output.count("(done before)") == 2
    other = run(*arguments, "--foreign", "9.5")
    assert other.exit_code == 1 and "has results of other groups or weights" in " ".join(other.output.split())

    calibrated = run("calibrate", root / "test", "--groups", out, "--count", 1, "--crop", 32, "--share", 1)
    assert calibrated.exit_code == 0, calibrated.output
    record = json.loads((out / "calibration.json").read_text())
    assert {name: len(values) for name, values in record["distances"].items()} == {"GB": 1, "SP": 1, "GN": 1}
    assert record["limit"] == max(value for values in record["distances"].values() for value in values) > 4
    assert json.loads((out / "groups.json").read_text())["foreign"] == record["limit"]
    assert "nearest to their own group" in calibrated.output and "before: 4.00" in calibrated.output
    kept = (out / "calibration-measured.json").stat().st_mtime_ns
    again = run("calibrate", root / "test", "--groups", out, "--count", 1, "--crop", 32, "--share", 0.5)
    assert again.exit_code == 0 and json.loads((out / "groups.json").read_text())["foreign"] < record["limit"]
    assert (out / "calibration-measured.json").stat().st_mtime_ns == kept
    assert run(*arguments).exit_code == 1  # the results there are of the old limit


def test_groups_have_to_be_of_what_was_measured(root):
    similarities(root)
    for group, sentence in (("GB+JP", "group: expected some of GB, GN, SP, got 'JP'"), ("GB+GB", "each once")):
        result = run("train", f"data.root={root}", "--config", root / "config.yaml", "--group", group, "--similarity",
                     root / "similarity.json", "-o", root / "x")  # fmt: skip
        assert result.exit_code == 1 and sentence in " ".join(result.output.split()), result.output
