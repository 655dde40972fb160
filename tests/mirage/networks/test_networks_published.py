"""`mirage.networks.published` on checkouts written here: what it loads and replaces, and what it says is missing."""

import sys

import pytest
import torch
from torch import nn

from mirage.networks import published

ADAIR = """
from torch import nn

class AdaIR(nn.Conv2d):
    def __init__(self, width=4, decoder=False):
        super().__init__(3, width, 1)
        self.decoder = decoder
"""
NAFNET = """
from basicsr.models.archs.arch_util import Norm
from basicsr.models.archs.local_arch import Local_Base

class NAFNet(Norm):
    def __init__(self, width, enc_blk_nums, middle_blk_num, dec_blk_nums):
        super().__init__(width)
        self.local = Local_Base
"""
ARCH_UTIL = """
import torchvision
from basicsr.utils import get_root_logger
from torch import nn

class Norm(nn.LayerNorm):
    version = torchvision.__version__
"""


@pytest.fixture
def folder(tmp_path):
    files = {
        "AdaIR/net/model.py": ADAIR,
        "NAFNet/basicsr/models/archs/NAFNet_arch.py": NAFNET,
        "NAFNet/basicsr/models/archs/arch_util.py": ARCH_UTIL,
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    return tmp_path


@pytest.fixture
def einops_is_there(monkeypatch):
    monkeypatch.setattr(published, "is_there", lambda name: name == "einops")


def test_a_network_is_built_as_published_unless_told_otherwise(folder, einops_is_there):
    assert published.missing("adair", folder) == ""
    network = published.create("adair", str(folder))
    assert isinstance(network, nn.Conv2d) and network.decoder is True and network.out_channels == 4
    network = published.create("adair", folder, width=6, decoder=False)
    assert network.decoder is False and network.out_channels == 6
    assert type(network) is published.class_of("adair", folder), "a file is run once"


def test_what_files_import_and_do_not_need_is_replaced_while_they_load(folder, monkeypatch):
    installed = sys.modules["basicsr"] = type(sys)("basicsr")  # of another copy of it
    monkeypatch.delitem(sys.modules, "basicsr.models", raising=False)
    try:
        network = published.create("nafnet", folder)
        assert sys.modules["basicsr"] is installed
    finally:
        del sys.modules["basicsr"]
    assert network.normalized_shape == (32,) and network.version == "0.20.0"
    assert issubclass(network.local, nn.Module)
    assert not [name for name in sys.modules if name.startswith("basicsr")]
    with torch.no_grad():
        assert network(torch.rand(2, 32)).shape == (2, 32)


def test_a_checkout_that_fails_leaves_nothing_behind(folder):
    file = folder / "NAFNet/basicsr/models/archs/arch_util.py"
    file.write_text("import basicsr.utils\nraise RuntimeError('odd')\n")
    before = dict(sys.modules)
    with pytest.raises(RuntimeError, match="odd"):
        published.create("nafnet", folder)
    assert sys.modules == before


def test_what_is_missing_is_named(folder, monkeypatch):
    assert published.missing("moce-ir", None) == (
        "no folder of checkouts was given; it is in github.com/eduardzamfir/MoCE-IR"
    )
    with pytest.raises(FileNotFoundError, match=r"moce-ir-s: no MoCE-IR/src/net/moce_ir.py in .*eduardzamfir/MoCE-IR"):
        published.create("moce-ir-s", folder)
    monkeypatch.setattr(published, "is_there", lambda name: False)
    with pytest.raises(ImportError, match=r"adair: its code needs einops \(pip install einops\)"):
        published.create("adair", folder)
    with pytest.raises(ValueError, match="name: expected one of adair, moce-ir, .*, got 'airnet'"):
        published.missing("airnet", folder)
