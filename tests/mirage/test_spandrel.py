"""MIRAGE among the architectures of spandrel, with and without those of spandrel_extra_arches."""

import importlib
import sys

import pytest
import torch
from golden import load_golden_weights, mirage_mini, relative_error

import mirage
import mirage.fast

spandrel = pytest.importorskip("spandrel")
pytestmark = pytest.mark.filterwarnings("ignore::mirage.CheckpointWarning")  # the size is no published one


@pytest.fixture(scope="module")
def ours():
    return importlib.import_module("mirage.spandrel")


@pytest.fixture(scope="module")
def network():
    """A network of no published size, every weight off its initial value."""
    return load_golden_weights(mirage_mini()).eval()


@pytest.fixture(params=("alone", "after the extra ones", "before the extra ones"))
def registry(request, ours):
    """A copy of the main registry with MIRAGE, and with the extra architectures, which are added before or after it."""
    registry = spandrel.MAIN_REGISTRY.copy()
    assert "MIRAGE" not in registry
    if request.param != "alone":
        extra = pytest.importorskip("spandrel_extra_arches").EXTRA_REGISTRY
    if request.param == "after the extra ones":
        registry.add(*extra)
    assert ours.install(registry)
    if request.param == "before the extra ones":
        registry.add(*extra)
    return registry


def image(height=24, width=32, channels=3):
    return torch.rand(1, channels, height, width, generator=torch.Generator().manual_seed(0))


def expected(network, x):
    with torch.no_grad():
        return network(x).clamp(0, 1)


def test_a_mirage_file_gives_a_mirage_of_its_size(network, registry):
    descriptor = spandrel.ModelLoader(registry=registry).load_from_state_dict(network.state_dict())
    assert isinstance(descriptor, spandrel.ImageModelDescriptor)
    assert isinstance(descriptor.model, mirage.MIRAGE) and not descriptor.model.training
    assert descriptor.architecture.id == "MIRAGE" and descriptor.architecture.name == "MIRAGE"
    assert descriptor.model.config == network.config
    assert relative_error(descriptor(image()), expected(network, image())) < 1e-5


def test_no_other_architecture_takes_it_but_restormer(network, registry):
    """Which is why MIRAGE has to come before that one; and MIRAGE takes none but its own."""
    claimed = {arch.architecture.id for arch in registry if arch.detect(network.state_dict())}
    assert claimed - {"Restormer"} == {"MIRAGE"}
    order = [arch.architecture.id for arch in registry.architectures("detection")]
    if "Restormer" in order:
        assert "Restormer" in claimed and order.index("MIRAGE") < order.index("Restormer")


def test_a_restormer_file_is_none(registry):
    from mirage import networks

    sizes = {"dim": 8, "num_blocks": [1, 1, 1, 1], "heads": [1, 1, 2, 2], "num_refinement_blocks": 1}
    restormer = networks.create("restormer", **sizes)
    assert not registry["MIRAGE"].detect(restormer.state_dict())
    assert not registry["MIRAGE"].detect({}) and not registry["MIRAGE"].detect({"epoch": 3, "state_dict": {}})
    if "Restormer" in registry:
        found = spandrel.ModelLoader(registry=registry).load_from_state_dict(restormer.state_dict())
        assert found.architecture.id == "Restormer"


def test_what_the_descriptor_says(network, registry):
    loader = spandrel.ModelLoader(registry=registry)
    found = loader.load_from_state_dict(network.state_dict())
    assert (found.scale, found.purpose, found.input_channels, found.output_channels) == (1, "Restoration", 3, 3)
    assert found.supports_half and found.supports_bfloat16 and found.dtype == torch.float32
    assert found.size_requirements == spandrel.SizeRequirements(multiple_of=8)
    assert found.tiling is spandrel.ModelTiling.DISCOURAGED
    assert found.tags == ["12dim"]
    grey = load_golden_weights(mirage_mini(in_channels=1)).eval()
    found = loader.load_from_state_dict(grey.state_dict())
    assert (found.input_channels, found.output_channels) == (1, 1)
    assert relative_error(found(image(channels=1)), expected(grey, image(channels=1))) < 1e-5


@pytest.mark.parametrize("size, build, dim", [("Tiny", mirage.mirage_tiny, 24), ("Small", mirage.mirage_small, 30)])
def test_the_papers_sizes_have_their_names(size, build, dim, ours):
    model = build(spd=False)
    found = ours.MIRAGEArch(fast=False).load(model.state_dict())
    assert found.tags == [size, f"{dim}dim"] and found.model.config == model.config


def test_tiles_do_not_give_what_one_pass_gives(network, ours):
    """Which is what DISCOURAGED says: the left of a part that reaches far beyond it is not that of the whole."""
    found = ours.MIRAGEArch().load(network.state_dict())
    x = image(32, 128)
    whole, part = found(x), found(x[..., :96])
    assert relative_error(part[..., :8], whole[..., :8]) > 1e-3


def test_fast_modules_are_in_place_and_need_not_be(network, ours):
    fast = ours.MIRAGEArch().load(network.state_dict())
    plain = ours.MIRAGEArch(fast=False).load(network.state_dict())
    assert type(fast.model) is mirage.fast.MIRAGE and type(plain.model) is mirage.MIRAGE
    assert not mirage.fast.summary(fast.model).kept
    assert mirage.fast.accelerate(fast.model) is fast.model
    mirage.fast.accelerate(plain.model)
    assert mirage.fast.summary(plain.model).replaced == mirage.fast.summary(fast.model).replaced
    assert torch.equal(plain(image()), fast(image()))


@pytest.mark.parametrize("size", [(8, 8), (17, 30), (1, 5), (3, 100)])
def test_images_of_any_size_are_padded_and_cut(size, network, ours):
    found = ours.MIRAGEArch().load(network.state_dict())
    x = image(*size)
    before = x.clone()
    restored = found(x)
    assert restored.shape == x.shape and torch.isfinite(restored).all() and torch.equal(x, before)


@pytest.mark.parametrize("dtype, limit", [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_half_precision_is_supported(dtype, limit, network, ours):
    found = ours.MIRAGEArch().load(network.state_dict()).to(dtype)
    restored = found(image().to(dtype))
    assert restored.dtype == dtype
    assert relative_error(restored, expected(network, image())) < limit


# How the released code's training and others' wrap the weights: what stands around them, and how they are then found.
WRAPPED = {
    "lightning": lambda s: {"state_dict": {**under("net.", s), "loss_fn.window": torch.ones(3)}, "epoch": 3},
    "prefix alone": lambda s: under("net.", s),
    "data parallel": lambda s: under("module.", s),
    "compiled": lambda s: under("_orig_mod.", s),
    "basicsr": lambda s: {"params": other(s), "params_ema": s},
    "average beside it": lambda s: {"state_dict": {**under("net.", other(s)), **under("ema.net.", s)}},
    "generator": lambda s: {"generator": s, "discriminator": {"conv.weight": torch.ones(3, 3)}},
}


def under(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def other(state):
    return {key: value + 1 for key, value in state.items()}


def loaded(path, ours):
    """The network of a file, by the main registry, and the extra architectures where they are there."""
    registry = spandrel.MAIN_REGISTRY.copy()
    ours.install(registry)
    try:
        from spandrel_extra_arches import EXTRA_REGISTRY

        registry.add(*EXTRA_REGISTRY)
    except ImportError:
        pass
    return spandrel.ModelLoader(registry=registry).load_from_file(path).model


def same_weights(model, network):
    state = network.state_dict()
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("wrapping", WRAPPED)
def test_checkpoints_as_they_are_written(wrapping, network, ours, tmp_path):
    path = tmp_path / ("weights.ckpt" if wrapping == "lightning" else "weights.pth")
    torch.save(WRAPPED[wrapping](network.state_dict()), path)
    model = loaded(path, ours)
    assert isinstance(model, mirage.MIRAGE) and same_weights(model, network)


def test_our_own_files(network, ours, tmp_path):
    mirage.save_checkpoint(network, tmp_path / "weights.safetensors")
    model = loaded(tmp_path / "weights.safetensors", ours)
    assert model.config == network.config and same_weights(model, network)


def test_what_is_missing_is_said(network, ours):
    state = network.state_dict()
    del state["latent.0.norm1.body.weight"]
    arch = ours.MIRAGEArch()
    assert arch.detect(state)
    with pytest.raises(mirage.CheckpointError, match="latent.0.norm1.body.weight"):
        arch.load(state)


def test_installing_is_once_in_the_main_registry(ours, network):
    before = list(spandrel.MAIN_REGISTRY.architectures())
    with pytest.raises(spandrel.UnsupportedModelError):
        spandrel.ModelLoader().load_from_state_dict(network.state_dict())
    try:
        assert ours.install() and not ours.install()
        assert len(spandrel.MAIN_REGISTRY) == len(before) + 1
        assert spandrel.ModelLoader().load_from_state_dict(network.state_dict()).architecture.id == "MIRAGE"
    finally:  # the registry has no way back, and other tests want it as it was
        fresh = spandrel.ArchRegistry()
        fresh.add(*before)
        vars(spandrel.MAIN_REGISTRY).update(vars(fresh))


def test_another_architecture_of_that_name_is_not_replaced(ours, network):
    class Other(spandrel.Architecture):
        def __init__(self):
            super().__init__(id="MIRAGE", detect=lambda state: False)

        def load(self, state_dict):
            raise NotImplementedError

    registry = spandrel.ArchRegistry()
    registry.add(spandrel.ArchSupport.from_architecture(Other()))
    with pytest.raises(spandrel.DuplicateArchitectureError, match="MIRAGE"):
        ours.install(registry)


def test_without_spandrel_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "spandrel", None)
    monkeypatch.delitem(sys.modules, "mirage.spandrel", raising=False)
    with pytest.raises(ImportError, match=r"^spandrel not installed; try: pip install 'mirage-kernels\[spandrel\]'$"):
        importlib.import_module("mirage.spandrel")
