"""What may lie beside the weights in a file, what may not, and that the advice printed works when pasted."""

import argparse
import collections
import datetime
import decimal
import functools
import pathlib
import re
import uuid
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from golden import load_golden_weights, mirage_mini
from torch import nn

import mirage
import mirage.fast
from mirage import CheckpointError, load_checkpoint
from mirage.checkpoint.torch_files import _Inert, read_torch_file


@pytest.fixture(scope="module")
def model() -> mirage.MIRAGE:
    return load_golden_weights(mirage_mini())


def assert_same(state, model) -> None:
    expected = model.state_dict()
    assert set(state) == set(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)


HARMLESS = {
    "path": pathlib.Path("/data/a"),
    "paths of other systems": [pathlib.PureWindowsPath("C:/data"), pathlib.PurePosixPath("a")],
    "float64": np.float64(0.5),
    "float32": np.float32(0.5),
    "int64": np.int64(3),
    "bool": np.bool_(True),
    "array": np.arange(6.0).reshape(2, 3),
    "array of text": np.array(["a", "bc"]),
    "array of objects": np.array([{"a": 1}, None], dtype=object),
    "structured array": np.zeros(2, dtype=[("a", "<f4"), ("b", "O")]),
    "dtype": np.dtype("float16"),
    "type": [np.float32, float, int, dict],
    "random state": np.random.get_state(),
    "defaultdict": collections.defaultdict(list, a=[1]),
    "deque": collections.deque([1, 2], maxlen=3),
    "datetime": datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.timezone.utc),
    "date": [datetime.date(2026, 1, 2), datetime.time(3), datetime.timedelta(1)],
    "slice": slice(1, 5, 2),
    "range": range(3),
    "frozenset": frozenset({1, 2}),
    "namespace": argparse.Namespace(lr=2e-4, root=pathlib.Path("a"), when=datetime.date(2026, 1, 2)),
    "simple namespace": SimpleNamespace(a=1),
    "others": [decimal.Decimal("0.1"), uuid.UUID(int=3), complex(1, 2), torch.Size([1]), torch.float16],
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("value", HARMLESS.values(), ids=HARMLESS)
def test_harmless_values_beside_the_weights(value, zipped, model, tmp_path) -> None:
    content = {"hyper_parameters": {"x": value}, "callbacks": {"best": [value]}, "state_dict": model.state_dict()}
    torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=zipped)
    assert_same(load_checkpoint(tmp_path / "x.ckpt"), model)


@pytest.mark.parametrize("name", ["pathlib.WindowsPath", "pathlib._local.PosixPath", "numpy.core.multiarray.scalar"])
def test_values_of_another_system_or_version(name, model, tmp_path) -> None:
    """What a file has that was written on Windows, by Python 3.13, by NumPy 1: classes that need not exist here."""
    module, attribute = name.rsplit(".", 1)

    class Elsewhere:
        def __reduce__(self):
            return Elsewhere, ("a",)

    renamed = {"persistent": Elsewhere()}
    Elsewhere.__module__, Elsewhere.__qualname__ = "tests_of_checkpoints_", "Elsewhere_"
    import sys

    sys.modules["tests_of_checkpoints_"] = SimpleNamespace(Elsewhere_=Elsewhere)
    try:
        torch.save({**renamed, "state_dict": model.state_dict()}, tmp_path / "x", _use_new_zipfile_serialization=False)
    finally:
        del sys.modules["tests_of_checkpoints_"]
    data = (tmp_path / "x").read_bytes()
    written = b"ctests_of_checkpoints_\nElsewhere_\n"
    assert data.count(written) == 1
    (tmp_path / "x").write_bytes(data.replace(written, f"c{module}\n{attribute}\n".encode()))
    assert_same(load_checkpoint(tmp_path / "x"), model)


def test_weights_inside_a_defaultdict(model, tmp_path) -> None:
    torch.save({"nets": collections.defaultdict(dict, g=model.state_dict())}, tmp_path / "x.pth")
    assert_same(load_checkpoint(tmp_path / "x.pth"), model)


def test_nothing_harmless_is_made_while_reading(model, tmp_path) -> None:
    content = {"x": pathlib.Path("a"), "y": np.float64(1), "z": np.arange(3), "state_dict": model.state_dict()}
    torch.save(content, tmp_path / "x.pth")
    before = set(torch.serialization.get_safe_globals())
    content = read_torch_file(tmp_path / "x.pth")
    assert set(torch.serialization.get_safe_globals()) == before
    for key in "xyz":
        assert not isinstance(content[key], pathlib.PurePath | np.generic | np.ndarray)
        assert type(content[key]).__mro__[1:] == (_Inert, object)


class Custom:
    """A class of somebody's own."""


REFUSED = {
    "class": Custom(),
    "partial": functools.partial(int, base=2),
    "function": torch.nn.functional.relu,
    "getattr": pathlib.Path.touch,
    "module": nn.ReLU(),
}


@pytest.mark.parametrize("value", REFUSED.values(), ids=REFUSED)
def test_all_else_is_refused(value, model, tmp_path) -> None:
    torch.save({"hyper_parameters": {"x": value}, "state_dict": model.state_dict()}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="can run code"):
        load_checkpoint(tmp_path / "x.pth")


# --- the advice


def pasted(message: str, folder: pathlib.Path) -> pathlib.Path:
    """Run the line that the message prints; the file it wrote."""
    before = set(folder.iterdir())
    exec(re.search(r"import torch;.*", message).group(0), {})
    (written,) = set(folder.iterdir()) - before
    return written


CONTENTS = {
    "whole model": lambda m: m,
    "whole model in a mapping": lambda m: {"model": m, "epoch": 3},
    "whole model, its average empty": lambda m: {"model": m, "ema": None, "updates": 3},
    "wrapped": lambda m: nn.DataParallel(m),
    "lightning": lambda m: {"state_dict": {f"net.{k}": v for k, v in m.state_dict().items()}, "callbacks": Custom()},
    "params": lambda m: {"params": m.state_dict(), "opt": Custom()},
    "nested": lambda m: {"nets": {"g": m.state_dict()}, "opt": Custom()},
    "beside the weights": lambda m: {**m.state_dict(), "opt": Custom()},
    "accelerated": lambda m: mirage.fast.accelerate(m),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("layout", CONTENTS.values(), ids=CONTENTS)
def test_the_advice_works_when_pasted(layout, zipped, model, tmp_path) -> None:
    path = tmp_path / "it's whole.pth"
    torch.save(layout(load_golden_weights(mirage_mini())), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="If you trust its source") as caught:
        load_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: ") and str(caught.value).count(f"{path}: ") == 1
    assert_same(load_checkpoint(pasted(str(caught.value), tmp_path)), model)


def test_the_advice_keeps_every_network(model, tmp_path) -> None:
    average = mirage_mini()
    torch.save({"model": model, "ema": average}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "x.pt")
    written = pasted(str(caught.value), tmp_path)
    assert_same(load_checkpoint(written, key="model"), model)
    assert_same(load_checkpoint(written, key="ema"), average)


def test_no_line_is_advised_that_would_not_work(tmp_path) -> None:
    torch.save([Custom()], tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="save model.state_dict\\(\\) alone") as caught:
        load_checkpoint(tmp_path / "x.pt")
    assert "import torch" not in str(caught.value)
