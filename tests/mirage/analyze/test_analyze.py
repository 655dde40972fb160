"""mirage analyze: statistics of features whose values are known, and the figures of a tiny network."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import mirage
import mirage.fast
from mirage.analyze import Moments, analyze
from mirage.analyze.collect import Similarity
from mirage.cli import main

TINY = {"dim": 6, "num_blocks": (1, 1, 1, 1), "num_refinement_blocks": 0, "heads": (1, 1, 1, 1)}
PLACES = {"scale 1": 6, "scale 2": 12, "scale 3": 24, "scale 4": 48, "latent, projected": 24}


def images(count=3, size=16):
    generator = np.random.default_rng(0)
    return [generator.random((size, size + 8, 3), dtype=np.float32) for _ in range(count)]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return mirage.MIRAGE(**TINY).eval()


def test_moments_are_those_of_all_pixels_at_once():
    generator = np.random.default_rng(1)
    parts = [generator.standard_normal((5, n)) + 1e4 for n in (1, 40, 7)]  # far from 0: nothing may cancel
    moments = Moments(5)
    for part in parts:
        moments.add(part)
    whole = np.concatenate(parts, axis=1)
    spectrum = moments.spectrum()
    expected = np.sort(np.linalg.eigvalsh(np.cov(whole)))[::-1]
    np.testing.assert_allclose(spectrum.variances, expected, rtol=1e-6)
    np.testing.assert_allclose(spectrum.singular[0], np.linalg.svd(whole)[1][0], rtol=1e-10)


def test_a_spectrum_of_known_rank():
    generator = np.random.default_rng(2)
    basis = np.linalg.qr(generator.standard_normal((1000, 4)))[0].T  # orthonormal rows
    basis -= basis.mean(axis=1, keepdims=True)
    basis = np.linalg.qr(basis.T)[0].T
    x = np.diag([8.0, 4.0, 2.0, 1.0]) @ basis  # variances as 64 : 16 : 4 : 1
    moments = Moments(4)
    moments.add(x)
    spectrum = moments.spectrum()
    np.testing.assert_allclose(spectrum.explained, np.cumsum([64, 16, 4, 1]) / 85, atol=1e-3)
    assert (spectrum.rank(0.7), spectrum.rank(0.9), spectrum.rank(1.0)) == (1, 2, 4)
    np.testing.assert_allclose(spectrum.singular, [8, 4, 2, 1], rtol=1e-2)
    p = np.array([8, 4, 2, 1]) / 15
    assert spectrum.entropy_rank == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-2)
    assert spectrum.mean_similarity < 0.05  # orthogonal channels


def test_channels_that_are_one():
    line = np.random.default_rng(3).standard_normal(100)
    moments = Moments(3)
    moments.add(np.stack([line, -2 * line, 3 * line]))
    spectrum = moments.spectrum()
    assert spectrum.rank() == spectrum.energy_rank() == 1
    assert spectrum.mean_similarity == pytest.approx(1)
    np.testing.assert_allclose(spectrum.similarity, [[1, -1, 1], [-1, 1, -1], [1, -1, 1]], atol=1e-12)
    assert spectrum.entropy_rank == pytest.approx(1, abs=1e-5)


def test_channels_that_are_zero():
    moments = Moments(2)
    moments.add(np.zeros((2, 9)))
    spectrum = moments.spectrum()
    assert (spectrum.rank(), spectrum.energy_rank(), spectrum.entropy_rank, spectrum.mean_similarity) == (0, 0, 0, 0)


def test_a_mean_that_channels_share_is_one_singular_value_and_no_variance():
    moments = Moments(4)
    moments.add(np.random.default_rng(4).standard_normal((4, 500)) + 30)
    spectrum = moments.spectrum()
    assert (spectrum.rank(), spectrum.energy_rank()) == (4, 1)


def test_similarity_on_and_off_the_diagonal():
    found = Similarity(np.array([[0.5, -0.1], [0.3, 0.7]]))
    assert (found.diagonal, found.off_diagonal) == (pytest.approx(0.6), pytest.approx(0.2))
    assert found.ratio == pytest.approx(1 / 3)
    assert np.isnan(Similarity(np.array([[0.5]])).ratio)


def test_what_is_looked_at_is_what_the_modules_return(model):
    given = images()
    found = analyze(model, given)
    assert {place: each.channels for place, each in found.spectra.items()} == PLACES
    batch = [torch.from_numpy(image).permute(2, 0, 1)[None] for image in given]
    with torch.inference_mode():
        first = [model.encoder_level1(model.patch_embed(x))[0].flatten(1) for x in batch]
        pairs = [model(x, return_spd=True)[1] for x in batch]
    whole = torch.cat(first, dim=1).double().numpy()
    expected = np.linalg.eigvalsh(np.cov(whole))[::-1]
    np.testing.assert_allclose(found.spectra["scale 1"].variances, expected, rtol=1e-4, atol=1e-8)
    shallow, latent = (torch.cat([pair[i] for pair in pairs]).double() for i in (0, 1))
    np.testing.assert_allclose(found.embeddings.matrix, (shallow @ latent.T).numpy(), atol=1e-5)
    assert found.channels.shape == (6, 24) and 0 <= found.channels.min() <= found.channels.max() <= 1 + 1e-12


def test_an_accelerated_network_gives_the_same(model):
    plain = analyze(model, images())
    fast = analyze(mirage.fast.accelerate(model), images())
    for place, each in plain.spectra.items():
        np.testing.assert_allclose(fast.spectra[place].singular, each.singular, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(fast.embeddings.matrix, plain.embeddings.matrix, atol=1e-4)


def test_the_network_is_left_as_it_was(model):
    model.train()
    analyze(torch.nn.Sequential(model), images(1))
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_without_an_spd_head_there_is_no_figure_6():
    found = analyze(mirage.MIRAGE(**TINY, spd=False), images(2))
    assert found.embeddings is None and found.images == 2


def test_what_cannot_be_analysed(model):
    with pytest.raises(ValueError, match="model: expected a mirage.MIRAGE"):
        analyze(torch.nn.Identity(), images(1))
    with pytest.raises(ValueError, match="images: expected at least one"):
        analyze(model, [])


def test_the_command_draws_and_writes(model, tmp_path):
    pytest.importorskip("imagecodecs")
    pytest.importorskip("matplotlib")
    from mirage.images import ImageFile, read_image, write_image

    for name, side in (("a", 40), ("b", 32), ("small", 16)):
        pixels = np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)
        write_image(tmp_path / f"{name}.png", ImageFile(pixels))
    mirage.save_checkpoint(model, tmp_path / "w.safetensors")
    out = tmp_path / "out"
    arguments = ["analyze", tmp_path, "--weights", tmp_path / "w.safetensors", "-o", out, "--size", 32, "--sigma", 25]
    result = CliRunner().invoke(main, [str(each) for each in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "Channels over 2 images:" in result.output and "16x16 pixels are less than --size 32" in result.output
    assert "31 of 192" in result.output and "off-diagonal" in result.output
    for figure in (3, 4, 5, 6):
        drawn = read_image(out / f"figure{figure}.png").pixels
        assert drawn.std() > 10  # something is on it
    with open(out / "figure4-ranks.csv", newline="") as file:
        rows = {row["place"]: row for row in csv.DictReader(file)}
    assert {place: int(row["channels"]) for place, row in rows.items()} == PLACES
    with open(out / "figure3.csv", newline="") as file:
        rows3 = [row for row in csv.DictReader(file) if row["place"] == "scale 2"]
    assert len(rows3) == 12 and float(rows3[-1]["explained variance, cumulative"]) == pytest.approx(1)
    assert float(rows3[0]["singular value, relative"]) == 1
    with open(out / "figure6.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 4
    refused = CliRunner().invoke(main, [*map(str, arguments[:-3]), "30"])
    assert refused.exit_code != 0 and "expected a multiple of 8, got 30" in refused.output
