"""Table 6: what is printed as published, what is measured, and the files it is written to."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import astuple

import numpy as np
import pytest
import torch
from PIL import Image as PIL
from rich.console import Console

from mirage import table6
from mirage.images import ImageFile, write_image
from mirage.table6 import PAPER, MeasuredRow, Table6, load_photograph


@pytest.fixture(scope="module")
def measured() -> Table6:
    return table6.run(size=16, runs=2, variants=("T",))


@pytest.fixture
def both() -> Table6:
    """A table with figures of our own, to check what is made of them."""
    rows = (
        MeasuredRow("MIRAGE-T", "reference", 6.207, 16.25, 3594.0, 1.0, 0.9, 1.2, None),
        MeasuredRow("MIRAGE-T", "fast", 6.207, 16.25, 400.0, 0.25, 0.2, 0.3, 3e-6, ("mirage_kernels.odd.default",)),
        MeasuredRow("MIRAGE-S", "reference", 9.679, 26.68, 4915.0, 2.0, 1.9, 2.2, None),
    )
    conditions = {"input_size": [1, 3, 224, 224], "dtype": "float32", "image": "a photograph", "device": "a processor"}
    return Table6(conditions | {"threads": 2, "torch": "2.6.0", "runs": 5}, rows)


def printed(table: Table6) -> str:
    out = io.StringIO()
    table6.render(table, Console(file=out, width=120))
    return out.getvalue()


def line_of(text: str, *words: str) -> str:
    (line,) = (line for line in text.splitlines() if all(word in line for word in words))
    return line


def test_published_rows():
    """Every figure of Table 6 as it is printed: PSNR (two are not reported), memory, parameters, multiply-adds."""
    assert [astuple(row) for row in PAPER] == [
        ("AirNet", 31.20, 4829, 8.93, 238),
        ("PromptIR", 32.06, 9830, 35.59, 132),
        ("IDR", None, 4905, 15.34, 98),
        ("AdaIR", None, 9740, 28.79, 124),
        ("MoCE-IR-S", 32.51, 4263, 11.48, 37),
        ("MoCE-IR", 32.73, 6654, 25.35, 75),
        ("MIRAGE-T", 32.77, 3729, 6.21, 16),
        ("MIRAGE-S", 32.91, 4810, 9.68, 27),
    ]


def test_note_says_what_the_paper_does_not_report(both):
    text = " ".join(printed(both).split())
    assert "the paper reports none for IDR and AdaIR." in text


def test_measured_rows(measured):
    assert [(row.method, row.implementation) for row in measured.measured] == [
        ("MIRAGE-T", "reference"),
        ("MIRAGE-T", "fast"),
    ]
    for row in measured.measured:
        assert row.params == pytest.approx(6.207412)
        assert 0 < row.seconds_min <= row.seconds <= row.seconds_max
        assert row.memory_mib > 6.2 * 4e6 / 2**20  # more than the parameters
    reference, fast = measured.measured
    assert reference.difference is None
    assert fast.difference < 1e-4
    assert reference.gmacs == pytest.approx(16.25 * (16 / 224) ** 2, rel=0.1)
    assert fast.uncounted == () and fast.gmacs == reference.gmacs
    assert measured.conditions["input_size"] == [1, 3, 16, 16]
    assert measured.conditions["threads"] == torch.get_num_threads()


def test_the_seed_sets_the_weights():
    same, again, other = (next(table6.build("T", "reference", seed).parameters()) for seed in (1, 1, 2))
    assert torch.equal(same, again) and not torch.equal(same, other)


def test_building_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    table6.build("T", "reference", 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_printed_table(both):
    text = printed(both)
    assert all(row.method in text for row in PAPER)
    for words, cells in (
        (("IDR", "4905"), ["-", "15.34", "98", "4905"]),
        (("AdaIR", "9740"), ["-", "28.79", "124", "9740"]),
    ):
        assert [cell.strip() for cell in line_of(text, *words).split("│")[3:7]] == cells
    assert "35.59" in line_of(text, "PromptIR") and "9830" in line_of(text, "PromptIR")
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if "MIRAGE-T" in line)
    assert "3729" in lines[at] and "ours, reference" in lines[at + 1] and "ours, fast" in lines[at + 2]
    assert all(word in lines[at + 2] for word in ("400", "0.250", "4.00x", "3.0e-06"))
    for unit in ("Params M", "MACs G", "Memory MiB", "Forward s"):
        assert unit in text
    assert "mirage_kernels.odd.default" in text


def test_printed_table_without_ours():
    conditions = {"input_size": [1], "dtype": "", "image": "", "device": "", "threads": 1, "torch": "", "runs": 1}
    text = printed(Table6(conditions, ()))
    assert "ours" not in text.split("Input")[0].replace("and ours", "") and "4810" in text


def test_json(measured, tmp_path):
    table6.write_json(measured, tmp_path / "t.json")
    content = json.loads((tmp_path / "t.json").read_text())
    assert [row["method"] for row in content["paper"]] == [row.method for row in PAPER]
    assert content["paper"][2]["psnr"] is None and content["paper"][2]["params"] == 15.34
    assert content["measured"][0]["seconds"] == measured.measured[0].seconds
    assert content["conditions"]["units"]["memory_mib"] == "MiB"


def test_csv(both, tmp_path):
    table6.write_csv(both, tmp_path / "t.csv")
    with open(tmp_path / "t.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(PAPER) + 3
    idr = {"method": "IDR", "implementation": "paper", "memory_mib": "4905", "params": "15.34", "psnr": ""}
    assert rows[2] | idr == rows[2]
    assert (rows[9]["implementation"], rows[9]["seconds"], rows[9]["uncounted"]) == (
        "fast", "0.25", "mirage_kernels.odd.default"
    )  # fmt: skip


def test_plot_draws_every_bar(both, tmp_path):
    table6.plot(both, tmp_path / "t.png")
    with PIL.open(tmp_path / "t.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000
        colours = {tuple(pixel) for pixel in np.asarray(picture.convert("RGB")).reshape(-1, 3)[::7].tolist()}
    assert {(0x9A, 0xA5, 0xB1), (0x48, 0x78, 0xA8), (0xD1, 0x60, 0x3D)} <= colours
    table6.plot(both, tmp_path / "t.svg")
    assert "MIRAGE-T, fast" in (tmp_path / "t.svg").read_text() or (tmp_path / "t.svg").stat().st_size > 10_000


# --- other networks


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The methods, as small networks, and a folder with a checkout of what one of them needs."""
    sizes = {"dim": 16, "num_blocks": (1, 1, 1, 1), "num_refinement_blocks": 1, "heads": (1, 1, 2, 4)}
    levels = {"width": 4, "encoder_blocks": (1,), "middle_blocks": 1, "decoder_blocks": (1,)}
    methods = {
        "T": table6.METHODS["T"],
        "PromptIR": table6.Method("PromptIR", "promptir", sizes),
        "MoCE-IR-S": table6.Method("MoCE-IR-S", published="moce-ir-s"),
        "NAFNet": table6.Method("NAFNet", "nafnet", levels),
    }
    monkeypatch.setattr(table6, "METHODS", methods)
    monkeypatch.setattr("mirage.networks.published.is_there", lambda name: name == "einops")
    file = tmp_path / "MoCE-IR/src/net/moce_ir.py"
    file.parent.mkdir(parents=True)
    file.write_text(ROUTED)
    return tmp_path


ROUTED = """
import torch
from torch import nn

class MoCEIR(nn.Module):
    def __init__(self, **arguments):
        super().__init__()
        self.experts = nn.ModuleList(nn.Conv2d(3, 3, 2 * i + 1, padding=i, bias=False) for i in range(4))

    def forward(self, x):
        chosen = torch.randn(4).argmax()
        return self.experts[chosen.item()](x)
"""


def test_other_networks_are_measured(tiny):
    table = table6.run(size=16, runs=1, variants=("PromptIR", "NAFNet", "MoCE-IR-S"), code=tiny)
    rows = {(row.method, row.implementation): row for row in table.measured}
    assert list(rows) == [
        (name, kind) for name in ("PromptIR", "NAFNet", "MoCE-IR-S") for kind in ("reference", "fast")
    ]
    for method in ("PromptIR", "NAFNet", "MoCE-IR-S"):
        reference, fast = rows[method, "reference"], rows[method, "fast"]
        assert reference.params == fast.params > 0 and reference.gmacs == fast.gmacs > 0
        assert fast.difference < 1e-4, "the same weights, and the same draws"
    assert rows["MoCE-IR-S", "reference"].gmacs * 1e9 in [9 * 256 * (2 * i + 1) ** 2 for i in range(4)], "one expert"
    text = printed(table)
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if "NAFNet" in line)
    assert "not in Table 6" in lines[at] and "ours, reference" in lines[at + 1] and "ours, fast" in lines[at + 2]
    at = next(i for i, line in enumerate(lines) if "PromptIR" in line)
    assert "35.59" in lines[at] and "ours, reference" in lines[at + 1]
    assert "MoCE-IR runs one of four experts" in text


def test_branches_that_begin_with_nothing_are_moved(tiny):
    """Else NAFNet's blocks would be the identity, and no error of theirs seen."""
    network = table6.build("NAFNet", "reference", 0)
    assert all(parameter.std() > 0 for parameter in network.parameters() if parameter.numel() > 1)
    assert torch.equal(network.middle_blks[0].beta, table6.build("NAFNet", "fast", 0).middle_blks[0].beta)


def test_what_cannot_be_built_is_named(tiny):
    absent = table6.not_built()
    assert absent["AirNet"] == "it is not in this package" and "IDR" in absent and "AdaIR" in absent
    assert "no folder of checkouts was given" in absent["MoCE-IR-S"] and "PromptIR" not in absent
    assert "MoCE-IR-S" not in table6.not_built(tiny)
    with pytest.raises(ValueError, match="variants: MoCE-IR-S cannot be built: no folder of checkouts was given"):
        table6.run(size=16, variants=("MoCE-IR-S",))


def test_the_methods_are_those_of_the_paper():
    """By their parameters: of Table 6, or of Table 2, which has whole millions."""
    published = {row.method: (row.params, 0.006) for row in PAPER} | {"Restormer": (26, 0.5), "NAFNet": (17, 0.5)}
    for method in table6.METHODS.values():
        if not method.published:
            with torch.device("meta"):
                count = sum(p.numel() for p in method.create(None).parameters()) / 1e6
            expected, rounding = published[method.name]
            assert count == pytest.approx(expected, abs=rounding), method.name


# --- the photograph


def test_the_default_photograph_needs_no_network(monkeypatch):
    import socket

    monkeypatch.setattr(socket, "socket", lambda *a, **k: pytest.fail("the network was used"))
    x = load_photograph(None, 224)
    assert x.shape == (1, 3, 224, 224) and x.dtype == torch.float32
    assert 0 <= x.min() < 0.1 and 0.9 < x.max() <= 1
    assert x.std() > 0.2


def test_a_file_is_cropped_at_its_centre(tmp_path):
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[:, 16:32] = (10, 20, 30)
    write_image(tmp_path / "a.png", ImageFile(pixels))
    x = load_photograph(tmp_path / "a.png", 8)
    expected = torch.tensor([10, 20, 30]).view(1, 3, 1, 1) / 255
    assert torch.equal(x, expected.expand(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("channels", "dtype", "value"), [(1, np.uint16, 0x8080), (2, np.uint8, 128), (4, np.uint16, 0x8080)]
)
def test_grey_alpha_and_16_bit_photographs(tmp_path, channels, dtype, value):
    write_image(tmp_path / "a.png", ImageFile(np.full((9, 9, channels), value, dtype)))
    x = load_photograph(tmp_path / "a.png", 16)
    assert torch.allclose(x, torch.full((1, 3, 16, 16), 128 / 255))


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match="size: expected a positive multiple of 8, got 100"):
        load_photograph(None, 100)
    with pytest.raises(ValueError, match="cannot read"):
        load_photograph(tmp_path / "missing.png", 64)
    with pytest.raises(ValueError, match="runs: expected at least 1, got 0"):
        table6.run(runs=0)
    with pytest.raises(ValueError, match="variants: expected some of T, S, .*, got XL"):
        table6.run(variants=("XL",))
    with pytest.raises(ValueError, match="implementations: expected some of reference, fast, got none"):
        table6.run(implementations=())
