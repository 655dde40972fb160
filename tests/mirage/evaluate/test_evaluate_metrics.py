"""Metrics and noise of mirage evaluate: the values of their definitions."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("skimage")

from mirage.evaluate import METRICS, add_noise, find_sets, measure, noise_generator
from mirage.evaluate.metrics import to_y

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"


def two_images(height=23, width=19):
    """A smooth image and a worse one, both inside [0, 1]."""
    generator = np.random.default_rng(7)
    y, x = np.mgrid[:height, :width] / max(height, width)
    target = np.stack([x, y, (x + y) / 2], axis=2) * 0.6 + 0.2
    return target, np.clip(target + 0.1 * generator.standard_normal(target.shape), 0, 1)


def ssim(x, y, window, unbiased, peak):
    """SSIM of Wang et al. at every valid position of one channel, by the formula."""
    size = len(window)
    values = []
    for i in range(x.shape[0] - size + 1):
        for j in range(x.shape[1] - size + 1):
            a, b = x[i : i + size, j : j + size], y[i : i + size, j : j + size]
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            factor = size**2 / (size**2 - 1) if unbiased else 1
            var_a, var_b = (factor * (window * (p - m) ** 2).sum() for p, m in ((a, mean_a), (b, mean_b)))
            cov = factor * (window * (a - mean_a) * (b - mean_b)).sum()
            c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
            values.append(
                (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
            )
    return np.mean(values)


def gaussian(size=11, sigma=1.5):
    line = np.exp(-((np.arange(size) - size // 2) ** 2) / (2 * sigma**2))
    window = np.outer(line, line)
    return window / window.sum()


def test_psnr_is_that_of_its_definition():
    target, restored = two_images()
    expected = -10 * math.log10(np.mean((target - restored) ** 2))
    assert measure(target, restored, ["psnr"])["psnr"] == pytest.approx(expected, abs=1e-10)
    assert measure(target * 0 + 0.5, target * 0 + 0.6, ["psnr"])["psnr"] == pytest.approx(20, abs=1e-10)


def test_images_are_clipped_and_not_rounded():
    target = np.full((8, 8, 3), 1.0)
    values = measure(target, target + 5, ["psnr", "ssim"])
    assert values == {"psnr": math.inf, "ssim": pytest.approx(1)}
    fine = np.full((8, 8, 3), 0.5)
    assert measure(fine, fine + 1e-4, ["psnr"])["psnr"] == pytest.approx(80, abs=1e-6)
    rounded = -20 * math.log10(abs(round(0.5001 * 255) / 255 - 0.5))
    assert measure(fine, fine + 1e-4, ["psnr_8bit"])["psnr_8bit"] == pytest.approx(rounded, abs=1e-6)


def test_ssim_is_that_of_its_definition():
    target, restored = two_images()
    window = np.full((7, 7), 1 / 49)
    expected = np.mean([ssim(target[..., c], restored[..., c], window, True, 1) for c in range(3)])
    assert measure(target, restored, ["ssim"])["ssim"] == pytest.approx(expected, abs=1e-10)


def test_gaussian_ssim_is_wangs():
    target, restored = two_images()
    expected = np.mean([ssim(target[..., c], restored[..., c], gaussian(), False, 1) for c in range(3)])
    assert measure(target, restored, ["ssim_gaussian"])["ssim_gaussian"] == pytest.approx(expected, abs=1e-8)


def test_y_is_studio_range():
    target, restored = two_images()
    y = [16 + image @ [65.481, 128.553, 24.966] for image in (target, restored)]
    np.testing.assert_allclose(to_y(target), y[0], atol=1e-10)
    values = measure(target, restored, ["psnr_y", "ssim_y"])
    assert values["psnr_y"] == pytest.approx(10 * math.log10(255**2 / np.mean((y[0] - y[1]) ** 2)), abs=1e-9)
    assert values["ssim_y"] == pytest.approx(ssim(*y, gaussian(), False, 255), abs=1e-8)
    assert to_y(np.ones((1, 1, 3))).item() == pytest.approx(235)


@pytest.mark.skipif(not (DATA / "CBSD68").is_dir(), reason=f"the photographs of {DATA} are not here")
def test_the_values_of_a_photograph():
    image = read(sorted((DATA / "CBSD68" / "target").iterdir())[3])
    noisy = add_noise(image, 25, np.random.default_rng(0))
    values = measure(image, noisy, ["psnr", "ssim_gaussian", "ssim_y", "psnr_y"])
    assert values["psnr"] == pytest.approx(20.247, abs=5e-4)
    assert values["ssim_gaussian"] == pytest.approx(0.30127, abs=5e-6)
    assert values["ssim_y"] == pytest.approx(0.4763, abs=5e-5)
    assert values["psnr_y"] == pytest.approx(25.067, abs=5e-4)


def read(path):
    from mirage.images import read_image

    return read_image(path).pixels / 255


def test_averages():
    assert METRICS["psnr"].average([20.0, 40.0]) == pytest.approx(30)
    assert METRICS["psnr_pooled"].average([20.0, 40.0]) == pytest.approx(-10 * math.log10((1e-2 + 1e-4) / 2))
    assert METRICS["psnr_pooled"].average([math.inf, math.inf]) == math.inf


def test_what_cannot_be_measured_is_refused():
    target, restored = two_images()
    with pytest.raises(ValueError, match=r"metrics: expected some of psnr, .*, got 'mse'"):
        measure(target, restored, ["mse"])
    with pytest.raises(ValueError, match=r"one shape \[H, W, 3\], got \(23, 19, 3\) and \(23, 18, 3\)"):
        measure(target, restored[:, :-1])
    with pytest.raises(ValueError, match="not finite"):
        measure(target, restored * np.nan)


def test_every_metric_says_what_it_is():
    assert all(entry.name == name and len(entry.definition) > 20 for name, entry in METRICS.items())


def test_lpips_of_an_image_with_itself_is_zero():
    lpips = pytest.importorskip("lpips", exc_type=ImportError)
    try:
        lpips.LPIPS(net="alex", verbose=False)
    except OSError as error:
        pytest.skip(f"the weights of AlexNet cannot be had here: {error}")
    target, restored = two_images(64, 64)
    assert measure(target, target, ["lpips"])["lpips"] == 0
    assert 0 < measure(target, restored, ["lpips"])["lpips"] < 2


def test_noise_is_that_of_its_seed_and_name():
    image = np.full((4, 5, 3), 0.5)
    expected = np.random.default_rng([3, 0x352441C2]).standard_normal((4, 5, 3))  # CRC-32 of "abc"
    np.testing.assert_array_equal(add_noise(image, 25, noise_generator(3, "abc")), 0.5 + 25 / 255 * expected)
    assert not np.array_equal(add_noise(image, 25, noise_generator(3, "abd")), 0.5 + 25 / 255 * expected)


def test_noise_is_clipped_and_truncated():
    image = np.broadcast_to(np.arange(256)[:, None, None] / 255, (256, 40, 3))
    noisy = add_noise(image, 50, np.random.default_rng(0), "truncated")
    drawn = np.random.default_rng(0).standard_normal(image.shape)
    levels = np.clip(np.arange(256)[:, None, None] + 50 * drawn, 0, 255).astype(np.uint8)  # which drops the fraction
    np.testing.assert_array_equal(noisy, levels / 255)
    np.testing.assert_array_equal(add_noise(image, 0, np.random.default_rng(0), "truncated"), image)
    exact = add_noise(image, 50, np.random.default_rng(0))
    np.testing.assert_array_equal(exact, np.clip(image + 50 / 255 * drawn, 0, 1))
    with pytest.raises(ValueError, match="kind: expected one of float, truncated, got 'poisson'"):
        add_noise(image, 50, np.random.default_rng(0), "poisson")
    with pytest.raises(ValueError, match="sigma: expected a number not below 0, got -1"):
        add_noise(image, -1, np.random.default_rng(0))


def test_sets_that_are_nowhere():
    with pytest.raises(ValueError, match="set A: no such folder or text file"):
        find_sets("A", "/nowhere")
