"""Weights that come with the package: what they are, and that they restore a photograph."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from skimage import data
from skimage.metrics import peak_signal_noise_ratio

import mirage
from mirage.degradations import create
from mirage.restore import packaged_features, packaged_weights, resolve_weights
from mirage.unirestorer import load_extractor

# The cat's face, at an odd size, so that padding takes part.
CROP = (slice(20, 151), slice(100, 239))


@pytest.mark.parametrize(
    ("name", "bytes_"),
    [("denoise", 13e6), ("denoise-derain", 13e6), ("extractor-small", 0.65e6), ("descriptor-srresnet", 3.2e6)],
)
def test_they_are_small_and_have_a_card(name, bytes_):
    path = resolve_weights(name)
    assert path.stat().st_size < bytes_
    with safe_open(path, "pt") as file:
        dtypes = {file.get_slice(key).get_dtype() for key in file.keys()}
    assert dtypes - {"I64"} == {"F16"}  # a counter of batch norm is no number of the network
    card = path.with_suffix(".md").read_text(encoding="utf-8")
    assert card.startswith(f"# {name}.safetensors") and "research use" in card and "CBSD68" in card


@pytest.mark.parametrize(
    ("weights", "sigma", "least"),
    [("denoise", 15, 32.5), ("denoise", 25, 30.1), ("denoise", 50, 27.2), ("denoise-derain", 25, 30.0)],
)
def test_noise_is_taken_from_a_photograph(weights, sigma, least):
    clean = data.chelsea()[CROP]
    noise = sigma * np.random.default_rng(0).standard_normal(clean.shape)
    noisy = np.clip(clean + noise, 0, 255).round().astype(np.uint8)
    restored = mirage.Restorer(weights, device="cpu")(noisy)
    assert peak_signal_noise_ratio(clean, restored) > least


def test_rain_is_taken_from_a_photograph():
    clean = data.chelsea()[CROP]
    image = torch.from_numpy(clean / 255.0).float().permute(2, 0, 1)[None]
    rainy = (create("rain")(image, 1)[0][0].permute(1, 2, 0).clamp(0, 1) * 255).round().byte().numpy()
    restored = mirage.Restorer("denoise-derain", device="cpu")(rainy)
    assert peak_signal_noise_ratio(clean, rainy) < 25 and peak_signal_noise_ratio(clean, restored) > 32


def test_nothing_else_is_packaged():
    assert set(packaged_weights()) == {"denoise", "denoise-derain"}
    assert set(packaged_features()) == {"descriptor-srresnet", "extractor-small"}


def test_the_extractor_tells_degradations_apart():
    """Two photographs, five degradations: the nearest crop of the other photograph has the same one."""
    extractor = load_extractor("extractor-small")
    photographs = [data.chelsea(), data.coffee()]
    crops = [torch.from_numpy(p[60:188, 100:228] / 255.0).float().permute(2, 0, 1)[None] for p in photographs]
    kinds = [("GN", {"sigma": 40}), ("SP", {}), ("JP", {"quality": 12}), ("IN", {}), ("GB", {"sigma": 3})]
    first, second = (
        extractor.embed(torch.cat([create(kind, **settings)(crop, 0)[0] for kind, settings in kinds])) for crop in crops
    )
    similarity = F.normalize(first) @ F.normalize(second).T
    assert similarity.argmax(1).tolist() == list(range(len(kinds)))
