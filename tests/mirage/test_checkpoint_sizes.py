"""Weights of neither MIRAGE-T nor MIRAGE-S, also of the authors' class: the same numbers again, or a sentence."""

import warnings

import pytest
import torch
from click.testing import CliRunner
from lookalike import WholeNetwork

import mirage
from mirage import CheckpointError, CheckpointWarning, from_checkpoint, load_checkpoint, save_checkpoint
from mirage.cli import main

SIZES = {  # dim, blocks, refinement, heads
    "narrow": (12, (1, 2, 1, 1), 1, (1, 2, 2, 4)),
    "levels without blocks": (6, (0, 1, 0, 1), 2, (2, 1, 1, 2)),
    "as wide as MIRAGE-T": (24, (1, 0, 0, 1), 0, (1, 1, 1, 8)),
}


def foreign(dim, blocks, refinement, heads, **options):
    """Of the authors' class, every weight and statistic off its initial value, in float64 (of float32's values)."""
    torch.manual_seed(0)
    network = WholeNetwork(dim, blocks, refinement, heads, **{"head": (dim, 4 * dim), **options})
    with torch.no_grad():
        for value in (*network.parameters(), *network.buffers()):
            if value.is_floating_point():
                value += 0.05 * torch.rand_like(value)
    return network.double().eval()


@pytest.fixture(scope="module")
def image():
    return torch.rand(1, 3, 16, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def assert_same_numbers(model, network, image):
    with torch.no_grad():
        torch.testing.assert_close(model.double()(image), network(image)[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_what_is_saved_of_the_authors_class_is_read_back(size, image, tmp_path):
    network = foreign(*size)
    save_checkpoint(network, tmp_path / "x.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error", CheckpointWarning)
        model = from_checkpoint(tmp_path / "x.safetensors")
    dim, blocks, refinement, heads = size
    assert (model.config["dim"], model.config["num_blocks"]) == (dim, list(blocks))
    used = [a or b for a, b in zip(blocks, (refinement, 0, 0, 0), strict=True)]
    assert [n for n, count in zip(model.config["heads"], used, strict=True) if count] == [
        n for n, count in zip(heads, used, strict=True) if count
    ]
    assert model.config["num_refinement_blocks"] == refinement and model.config["spd"]
    assert_same_numbers(model, network, image)


def test_a_file_that_says_nothing_about_its_network(image, tmp_path):
    network = foreign(*SIZES["narrow"])
    torch.save({"params": network.state_dict()}, tmp_path / "x.pth")
    message = (
        r"neither MIRAGE-T nor MIRAGE-S; by its shapes MIRAGE\(dim=12, num_blocks=\[1, 2, 1, 1\], "
        r"num_refinement_blocks=1, heads=\[1, 2, 2, 4\]\)"
    )
    with pytest.warns(CheckpointWarning, match=message) as caught:
        model = from_checkpoint(tmp_path / "x.pth")
    assert len(caught) == 1 and caught[0].filename == __file__
    assert_same_numbers(model, network, image)
    result = CliRunner().invoke(main, ["export", str(tmp_path / "y.safetensors"), "--weights", str(tmp_path / "x.pth")])
    assert result.exit_code == 0, result.output
    assert_same_numbers(from_checkpoint(tmp_path / "y.safetensors"), network, image)


def test_an_spd_head_of_another_size_is_left_out(image, tmp_path):
    """The authors' class builds the head of MIRAGE-T at every size; with it a network of another cannot be trained."""
    network = foreign(*SIZES["narrow"], head=(24, 96))
    save_checkpoint(network, tmp_path / "x.safetensors")
    with pytest.warns(CheckpointWarning) as caught:
        model = from_checkpoint(tmp_path / "x.safetensors")
    assert "reduce_shallow.weight takes 24 channels where there are 12), and is left out" in str(caught[0].message)
    assert not model.config["spd"]
    assert_same_numbers(model, network, image)
    again = foreign(*SIZES["narrow"], head=(24, 96))
    torch.nn.init.zeros_(again.output.weight)
    load_checkpoint(tmp_path / "x.safetensors", again)
    assert_same_numbers(model, again, image)
    assert torch.equal(again.reduce_latent.weight, network.reduce_latent.weight), "the file holds it"


def test_networks_that_are_no_mirage_are_refused_in_a_sentence(image, tmp_path):
    """One depthwise kernel in the place of generated ones: the file is for that class alone."""
    network = foreign(*SIZES["narrow"], dynamic_conv=False)
    save_checkpoint(network, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="dim 12 belongs to neither.*cconv.weight.*then load_checkpoint"):
        from_checkpoint(tmp_path / "x.safetensors")
    again = foreign(*SIZES["narrow"], dynamic_conv=False)
    torch.nn.init.zeros_(again.output.weight)
    load_checkpoint(tmp_path / "x.safetensors", again)
    with torch.no_grad():
        assert torch.equal(again(image)[0], network(image)[0])


def test_a_missing_weight_is_missed_at_any_size(tmp_path):
    for size in SIZES.values():
        state = foreign(*size).state_dict()
        del state["latent.0.ffn.dwconv.weight"]
        torch.save(state, tmp_path / "x.pth")
        with pytest.raises(CheckpointError, match=r"latent\.0\.ffn\.dwconv\.weight"):
            from_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize("factor", [1.0, 2.66, 79 / 30, 2 + 1 / 3, 0.1, 3.999])
def test_the_expansion_of_feed_forward_networks_shows_in_their_widths(factor, tmp_path):
    for dim in (12, 24, 30):
        with torch.device("meta"):
            state = mirage.MIRAGE(dim=dim, num_blocks=(1, 1, 1, 1), ffn_expansion_factor=factor).state_dict()
        arguments = mirage.checkpoint.arguments_by_shapes(state)
        assert mirage.checkpoint.misfits(state, arguments) == []


def test_tied_weights_are_written_under_each_name(tmp_path):
    model = mirage.MIRAGE(dim=6, num_blocks=(2, 0, 0, 0), num_refinement_blocks=0, heads=(1, 1, 1, 1), spd=False)
    model.encoder_level1[1].ffn = model.encoder_level1[0].ffn
    save_checkpoint(model, tmp_path / "x.safetensors")
    state = from_checkpoint(tmp_path / "x.safetensors").state_dict()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
