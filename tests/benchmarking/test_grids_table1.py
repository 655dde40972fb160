"""benchmarks/grids_table1.py: its page and its check on the published values, and a run of it on a tiny network."""

import json

import numpy as np
import pytest
from train_cases import SMALL, write_pictures

from benchmarks import grids_table1
from mirage.grids import DEGRADATIONS, CachedPerformance, load_grouping, published, search_groups


def test_page_and_check_on_the_published_values():
    measured = published()
    assert grids_table1.check(measured, DEGRADATIONS, 0.7) == (9, 4, 1)
    assert grids_table1.check(measured, DEGRADATIONS, 6.0)[1:] == (1, 1)
    options = grids_table1.parse(["--data", ".", "--similarity", "s.json", "--paper-groups"])
    assert options.delta == [0.7]
    found = [search_groups(DEGRADATIONS, measured)]
    inputs = dict.fromkeys(DEGRADATIONS, 20.0)
    text = grids_table1.page(measured, DEGRADATIONS, inputs, found, [(9, 4, 1)], options)
    row = "28.22 | 31.71 | 37.24 | 38.68 | 34.03 | 41.30 | 32.23 | 33.88 | 32.86 | 30.71 | 46.57 | 35.22 |"
    assert f"| groups, delta 0.7 | {row}" in text and f"| groups of the paper | {row}" in text
    assert "| single-task | 27.99 | 31.80 " in text and text.count("| 35.13 |") == 1 and "| 32.98 |" in text
    assert "4 groups, compression 63.6%" in text and "6 yes, 3 no, 5 yes, 4 yes" in text
    assert "-2.14 dB on average, -5.32 at worst (MB)" in text


def test_check_fails_where_the_search_is_wrong(monkeypatch):
    wrong = search_groups(DEGRADATIONS, published(), 0.5)
    monkeypatch.setattr(grids_table1, "search_groups", lambda *arguments: wrong)
    with pytest.raises(AssertionError, match="brute force"):
        grids_table1.check(published(), DEGRADATIONS, 0.7)


def test_a_run_and_another_that_has_nothing_to_do(tmp_path, capsys):
    write_pictures(tmp_path / "BSD400", count=2)
    write_pictures(tmp_path / "CBSD68", count=2, seed=1)
    names = ["GB", "GN"]
    (tmp_path / "s.csv").write_text(",GB,GN\nGB,0,3\nGN,3.1,0\n")
    network = {name: value for name, value in SMALL.items() if not name.startswith("spd") and name != "dim"}
    overrides = [f"model.arguments={json.dumps(network)}", "data.batch=1", "data.crop=16", "trainer.accelerator=cpu",
                 "trainer.threads=1", f"data.sets.0.kind={json.dumps(names)}", "model.arguments.dim=6"]  # fmt: skip
    arguments = ["--data", str(tmp_path), "--similarity", str(tmp_path / "s.csv"), "--folder", str(tmp_path / "out"),
                 "--steps", "1", "--dim", "6", "--crop", "16", "--delta", "100", "--delta", "-100"]  # fmt: skip
    arguments += [part for each in overrides for part in ("--override", each)]
    grids_table1.main(arguments)
    text = (tmp_path / "out" / "table1.md").read_text()
    assert "| network | GB | GN | average |" in text and "| groups, delta 100 |" in text
    assert "Delta 100 dB: 1 group," in text and "Delta -100 dB: 2 groups" in text
    content = json.loads((tmp_path / "out" / "table.json").read_text())
    measured = CachedPerformance({each["group"]: each["psnr"] for each in content["groups"]})
    assert len(measured.values) == 3 and all(np.isfinite(v) for each in measured.values.values() for v in each.values())
    capsys.readouterr()
    grids_table1.main(arguments)
    assert "is done" not in capsys.readouterr().err
    assert (tmp_path / "out" / "table1.md").read_text() == text

    known = [each for each in arguments if each != str(tmp_path / "s.csv")]
    known[known.index("--similarity")] = "--known"
    grids_table1.main(known)
    assert "is done" not in capsys.readouterr().err
    text = (tmp_path / "out" / "table1.md").read_text()
    assert "Delta 100 dB, of these networks alone: 1 group," in text and "Bisection over sizes" not in text
    assert "--data DIR --known --dim 6" in text


def test_with_known_networks_alone_none_is_trained_for_the_search(tmp_path):
    write_pictures(tmp_path / "BSD400", count=2)
    write_pictures(tmp_path / "CBSD68", count=2, seed=1)
    options = ["--data", str(tmp_path), "--known", "--folder", str(tmp_path / "out"), "--steps", "1", "--dim", "6"]
    network = {name: value for name, value in SMALL.items() if not name.startswith("spd") and name != "dim"}
    for each in (f"model.arguments={json.dumps(network)}", "model.arguments.dim=6", "data.batch=1", "data.crop=16",
                 "trainer.accelerator=cpu", 'data.sets.0.kind=["GB", "GN", "SP"]'):  # fmt: skip
        options += ["--override", each]
    grids_table1.main([*options, "--crop", "16", "--delta", "100"])
    groups = [each["group"] for each in json.loads((tmp_path / "out" / "table.json").read_text())["groups"]]
    assert sorted(groups, key=len) == ["GB", "GN", "SP", "GB+GN+SP"]
    assert load_grouping(tmp_path / "out" / "groups-100.json").groups == (("GB", "GN", "SP"),)
