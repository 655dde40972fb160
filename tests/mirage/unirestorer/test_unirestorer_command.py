"""``mirage unirestorer``, stage by stage on pictures of 32 pixels, with networks of dim 6."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from train_cases import SMALL, write_pictures

from mirage.grids import MeasureGroup
from mirage.grids.training import psnr
from mirage.unirestorer import SmallExtractor, UniRestorer, save_extractor
from mirage.unirestorer.command import unirestorer

pytest.importorskip("sklearn")
ARGUMENTS = {name: value for name, value in SMALL.items() if not name.startswith("spd")}


def run(*arguments, code=0):
    result = CliRunner().invoke(unirestorer, [str(each) for each in arguments])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def root(tmp_path):
    write_pictures(tmp_path / "clean", size=(32, 40))
    write_pictures(tmp_path / "photos", count=2, size=(19, 27), seed=1)
    (tmp_path / "photos" / "broken.png").write_bytes(b"nothing")
    torch.manual_seed(0)
    save_extractor(SmallExtractor(), tmp_path / "extractor.safetensors")
    return tmp_path


def configured(root, steps=2, *more):
    return [
        "--config", "unirestorer-tiny", f"data.root={root}", "data.sets=[{clean: clean, kind: [GN, GB, low_haze]}]",
        "data.crop=24", "data.batch=2", f"schedule.steps={steps}", "schedule.warmup=0", "trainer.accelerator=cpu",
        "trainer.threads=1", f"model.arguments={json.dumps(ARGUMENTS)}", *more, "--system", root / "system",
    ]  # fmt: skip


@pytest.mark.parametrize("lora", [(), ("--lora", 2)], ids=["whole", "lora"])
def test_the_stages_one_after_the_other(root, lora):
    system = root / "system"
    cluster = ["cluster", *configured(root), "--extractor", root / "extractor.safetensors", "--samples", 24]
    text = run(*cluster, "--children", "2 auto:3")
    [of_root] = [line.split() for line in text.splitlines() if line.split()[:2] == ["0", "24"]]
    assert set(of_root[2:]) == {"GN", "GB", "low_haze"} and (system / "tree.json").is_file()
    assert run("describe", system).count(" no ") == 6

    error = run("router", *configured(root), code=1)
    assert "6 of 6 experts are not in" in " ".join(error.split())
    files = run("experts", *configured(root), *lora).split()
    assert len(files) == 6 and files[-1].endswith("005.safetensors")
    error = run("experts", *configured(root, 2, "data.augment=none"), *lora, code=1)
    assert "the tree is of other samples (data.augment" in " ".join(error.split())
    error = run("experts", *configured(root, 3), *lora, code=1)
    assert "holds experts of other settings" in " ".join(error.split())

    run("router", *configured(root, 2, "data.batch=4", "output.validate_steps=1"), "--balance", "both")
    described = json.loads(run("describe", system, "--json"))
    assert described["levels"] == [1, 2, 3] and described["router"] and described["extractor"]
    assert all(node["expert"] for node in described["nodes"]) and described["nodes"][0]["samples"] == 24
    assert sum(described["usage"].values()) == pytest.approx(1, abs=1e-5)
    assert run("describe", system).count(" yes ") == 6

    check_evaluation(root, system)
    text = run("restore", root / "photos", "--system", system, "-o", root / "out", "--device", "cpu", code=1)
    assert text.count("  expert ") == 2 and "failed" in text and "broken.png" in text
    lines = [json.loads(line) for line in (root / "out" / "experts.jsonl").read_text().splitlines()[1:]]
    assert len(lines) == 2 and all(len(line["p_leaf"]) == 3 and len(line["p_level"]) == 3 for line in lines)
    restore = ["restore", root / "photos" / "00.png", "--system", system, "-o", root / "out", "--device", "cpu"]
    again = run(*restore)
    assert "(done before)" in again
    confident = [*restore, "--confidence", 1]
    assert "has results of another system, task or confidence" in " ".join(run(*confident, code=1).split())
    assert "  level 0  expert 0 " in run(*confident, "--overwrite")
    assert "Invalid value for '--confidence'" in run(*restore, "--confidence", 0, code=2)
    task = ["restore", root / "photos" / "00.png", "--system", system, "--device", "cpu", "-o", root / "out2", "--task"]
    error = run(*task, "fog", code=1)
    assert "expected one of GB, GN, low_haze; got 'fog'" in " ".join(error.split())
    run(*task, "low_haze")


def check_evaluation(root, system):
    """Every way to choose is told of known and of held-out degradations, and nothing is measured twice."""
    evaluate = ["evaluate", root / "clean", "--system", system, "-o", root / "measured", "--crop", 16, "--limit", 2]
    evaluate += ["--device", "cpu"]
    lines = [line.split() for line in run(*evaluate).splitlines()]
    assert [line[0] for line in lines if line[1:2] == ["2"]] == ["GN", "GB", "low_haze"]
    text = run(*evaluate, "--degradations", "GN,GB+GN")
    assert "GB+GN (held out)" in text and "held-out pictures go to coarser levels" in text
    summary = json.loads((root / "measured" / "summary.json").read_text())
    row = summary["degradations"]["GB+GN"]
    assert not row["in_distribution"] and row["images"] == 2 and sum(row["levels"]) == pytest.approx(1)
    assert row["best node"] >= max(row["root"], row["finest"], row["router"], row["best leaf"])
    [record, _] = json.loads((root / "measured" / "GB+GN.json").read_text())["images"]
    restored = UniRestorer.load(system, device="cpu")
    [(seen, clean), _] = MeasureGroup(str(root / "clean"), 16, 2).pairs("GB+GN")
    result = restored.restore(seen)
    assert result.explanation.expert == record["expert"]
    assert psnr(clean, result.image) == pytest.approx(record["psnr"][record["expert"]])

    kept = (root / "measured" / "GN.json").stat().st_mtime_ns
    assert run(*evaluate, "--degradations", "GN,GB+GN") == text
    assert (root / "measured" / "GN.json").stat().st_mtime_ns == kept
    check_confident_evaluation(root, system, [*evaluate, "--degradations", "GN,GB+GN"])
    assert (root / "measured" / "GN.json").stat().st_mtime_ns == kept
    run(*evaluate, "--degradations", "GN", "--seed", 1)
    assert (root / "measured" / "GN.json").stat().st_mtime_ns > kept
    for more, sentence in (
        (("--degradations", "XX"), "unknown degradation 'XX'"),
        (("--degradations", "GN GN"), "expected each once"),
        (("--crop", 64), "expected at least 64 pixels a side"),
    ):
        assert sentence in " ".join(run(*evaluate, *more, code=1).split())
    nowhere = run("evaluate", root / "clean", "--system", root / "none", "-o", root / "m", code=1)
    assert "cluster makes it" in " ".join(nowhere.split())


def check_confident_evaluation(root, system, evaluate):
    """The level by the leaves' probabilities stands beside the router's, from what is measured."""
    for confidence, level in ((1, 0), (1e-6, 2)):
        text = run(*evaluate, "--confidence", confidence)
        assert " confident " in text and f"above the leaves: {1 - level / 2:.1%}" in text
        summary = json.loads((root / "measured" / "summary.json").read_text())
        assert summary["confidence"] == confidence and summary["ways"][3:6] == ["router", "confident", "instructed"]
        for row in summary["degradations"].values():
            assert row["levels"][level] == 1 and row["confident"] == row["finest" if level else "root"]
    images = json.loads((root / "measured" / "GB+GN.json").read_text())["images"]
    [(seen, _), *_] = MeasureGroup(str(root / "clean"), 16, 2).pairs("GB+GN")
    for confidence in (0.4, 0.6, 0.9):
        run(*evaluate, "--confidence", confidence)
        row = json.loads((root / "measured" / "summary.json").read_text())["degradations"]["GB+GN"]
        reached = [UniRestorer.load(system, device="cpu", confidence=confidence).select(seen).expert]
        reached.append(next(n for n, share in zip(path(system, images[1]), images[1]["shares"][::-1], strict=True)
                            if share >= confidence))  # fmt: skip
        expected = [image["psnr"][expert] for image, expert in zip(images, reached, strict=True)]
        assert row["confident"] == pytest.approx(sum(expected) / 2)
    for wrong in (0, 1.5, "much"):
        assert "Invalid value for '--confidence'" in run(*evaluate, "--confidence", wrong, code=2)


def path(system, image):
    """Nodes from the leaf of a picture up to the root."""
    return UniRestorer.load(system, device="cpu").tree.paths[image["leaf"]].tolist()[::-1]


def test_clustering_again_is_the_same_and_what_is_wrong_is_told(root):
    cluster = ["cluster", *configured(root), "--extractor", root / "extractor.safetensors", "--samples", 12]
    first = run(*cluster, "--children", "2")
    assert not (root / "system" / "tree.png").exists()
    assert run(*cluster, "--children", "2", "--plots") == first
    assert all((root / "system" / name).read_bytes()[:4] == b"\x89PNG" for name in ("tree.png", "embeddings.png"))
    assert "no file" in run(*configured_cluster(root, "absent.safetensors"), code=1)
    assert "children" in run(*cluster, "--children", "many", code=1)
    (root / "system" / "experts").mkdir()
    assert "has experts of another tree" in " ".join(run(*cluster, "--children", "3", code=1).split())
    assert "cluster makes it" in " ".join(run("describe", root / "nowhere", code=1).split())


def configured_cluster(root, extractor):
    return ["cluster", *configured(root), "--extractor", root / extractor, "--samples", 12]
