"""Weights that come with the package: what they are, and that they restore a photograph."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors import safe_open
from skimage import data
from skimage.metrics import peak_signal_noise_ratio

import mirage
from mirage.restore import packaged_weights

# The cat's face, at an odd size, so that padding takes part.
CROP = (slice(20, 151), slice(100, 239))


def test_they_are_small_and_have_a_card():
    path = packaged_weights()["denoise"]
    assert path.stat().st_size < 13e6
    with safe_open(path, "pt") as file:
        dtypes = {file.get_slice(name).get_dtype() for name in file.keys()}
    assert dtypes - {"I64"} == {"F16"}  # a counter of batch norm is no number of the network
    card = path.with_suffix(".md").read_text(encoding="utf-8")
    assert card.startswith("# denoise.safetensors") and "research use" in card and "CBSD68" in card


@pytest.mark.parametrize(("sigma", "least"), [(15, 32.5), (25, 30.1), (50, 27.2)])
def test_denoise_restores_a_photograph(sigma, least):
    clean = data.chelsea()[CROP]
    noise = sigma * np.random.default_rng(0).standard_normal(clean.shape)
    noisy = np.clip(clean + noise, 0, 255).round().astype(np.uint8)
    restored = mirage.Restorer("denoise", device="cpu")(noisy)
    assert peak_signal_noise_ratio(clean, restored) > least
