"""Degradations: each is what its definition says, at the stated strength, and draws the same from the same seed."""

from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mirage.degradations import CDD11, ELEVEN, REGISTRY, Applied, Composition, Mixture, apply, create, create_from
from mirage.degradations.blur import defocus_kernel, gaussian_kernel, motion_kernel, ringing_kernel
from mirage.degradations.filters import box_mean, convolve, guided_filter, mirrored
from mirage.degradations.scenes import made_up_depth, snow_flakes

SINGLE = tuple(REGISTRY)
ALL = (*SINGLE, *CDD11[4:], "GB+GN+JP")


def images(count=2, height=40, width=56, seed=0, dtype=torch.float32):
    """Smooth, coloured, 8 bits."""
    coarse = torch.rand(count, 3, 6, 7, generator=torch.Generator().manual_seed(seed))
    smooth = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
    return (smooth * 255).round().to(dtype) / 255


def plain(value, size=256):
    return torch.full((1, 3, size, size), value, dtype=torch.float64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# What all of them have in common


def test_the_registry_has_the_eleven_in_their_order_and_cdd11s():
    assert SINGLE == (*ELEVEN, "LO", "RA", "SN", "HA")
    assert ELEVEN == ("GB", "MB", "RL", "SR", "RI", "DB", "JP", "PO", "IN", "GN", "SP")
    assert all(cls.id == kind and create(cls.name) == create(kind) == cls() for kind, cls in REGISTRY.items())
    assert len(CDD11) == 11 and create("low_haze_rain").kind == "LO+RA+HA"
    assert create("haze+low").kind == "HA+LO" and create("Gaussian-Blur").kind == create("gb").kind == "GB"


@pytest.mark.parametrize("kind", ALL)
def test_a_batch_is_its_images_one_by_one(kind):
    pytest.importorskip("PIL")
    batch = images(3)
    degradation = create(kind)
    whole, applied = degradation(batch, generator(5))
    one_by_one = generator(5)
    singles = [degradation(batch[i : i + 1], one_by_one) for i in range(3)]
    assert torch.equal(whole, torch.cat([result for result, _ in singles]))
    assert applied == [record for _, records in singles for record in records]
    assert whole.dtype == batch.dtype and whole.shape == batch.shape and not torch.equal(whole, batch)


@pytest.mark.parametrize("kind", ALL)
def test_seeds_and_records_repeat_it(kind):
    pytest.importorskip("PIL")
    batch = images()
    degradation = create(kind)
    first, applied = degradation(batch, 7)
    again, _ = degradation(batch, generator(7))
    other, _ = degradation(batch, 8)
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (kind in ("RL", "RI"))  # which have nothing that is drawn
    stored = [Applied.from_dict(json.loads(json.dumps(record.as_dict()))) for record in applied]
    assert torch.equal(apply(batch, stored), first)
    arrays, _ = degradation(batch.numpy(), 7)
    assert isinstance(arrays, np.ndarray) and np.array_equal(arrays, first.numpy())


@pytest.mark.parametrize("kind", ALL)
def test_results_are_of_8_bits_unless_that_is_switched_off(kind):
    pytest.importorskip("PIL")
    rounded, _ = create(kind)(images(), 1)
    fine, records = create(kind, rounded=False)(images(), 1)
    eight = np.rint(rounded.numpy() * 255).astype(np.uint8)
    assert np.array_equal(rounded.numpy(), eight.astype(np.float32) / np.float32(255))
    assert fine.min() >= 0 and fine.max() <= 1 and (fine - rounded).abs().max() <= 0.5 / 255 + 1e-6
    of_pixels = kind in ("JP", "IN", "SP", "GB+GN+JP")
    assert torch.equal(fine, rounded) == of_pixels and not any(record.rounded for record in records)


@pytest.mark.parametrize("kind", [kind for kind in ALL if kind not in ("IN", "SR")])
def test_images_of_a_few_pixels_and_empty_batches(kind):
    pytest.importorskip("PIL")
    for height, width in ((1, 1), (2, 9), (5, 3)):
        result, applied = create(kind)(images(1, height, width), 0)
        assert result.shape == (1, 3, height, width) and torch.isfinite(result).all() and len(applied) == 1
    result, applied = create(kind)(images(1)[:0], 0)
    assert len(result) == len(applied) == 0


@pytest.mark.parametrize("kind", ("SR", "IN"))
def test_images_of_a_few_pixels(kind):
    result, _ = create(kind)(images(1, 2, 3), 0)
    assert result.shape == (1, 3, 2, 3) and torch.isfinite(result).all()


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), TypeError, "images: expected float32 or float64, got uint8"),
        (torch.zeros(1, 3, 4, 4).half(), TypeError, "expected float32 or float64, got float16"),
        (np.zeros((1, 3, 4, 4), np.uint8), TypeError, "images: expected float32 or float64, got uint8"),
        ([[0.0]], TypeError, "images: expected a tensor or a NumPy array, got list"),
        (torch.zeros(3, 4, 4), ValueError, r"images: expected \[N, 3, H, W\], got \[3, 4, 4\]"),
        (torch.zeros(1, 4, 4, 3), ValueError, r"images: expected \[N, 3, H, W\], got \[1, 4, 4, 3\]"),
        (torch.zeros(1, 3, 0, 4), ValueError, r"images: expected \[N, 3, H, W\], got \[1, 3, 0, 4\]"),
        (torch.full((1, 3, 4, 4), 255.0), ValueError, r"images: expected values in \[0, 1\], got 255 to 255"),
        (torch.full((1, 3, 4, 4), math.nan), ValueError, r"images: expected values in \[0, 1\], got nan to nan"),
    ],
)
def test_what_is_no_batch_of_images(wrong, error, message):
    with pytest.raises(error, match=message):
        create("GN")(wrong, 0)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("gausian_blur", {}, "unknown degradation 'gausian_blur'; the nearest is 'gaussian_blur'. Known: GB"),
        ("", {}, "kind: expected the name of a degradation, got ''"),
        ("GB", {"radius": 3}, "GB: unknown setting 'radius'; it has rounded, sigma, size"),
        ("GB+GN", {"sigma": 3}, r"GB\+GN: unknown setting 'sigma'"),
        (
            "GB",
            {"sigma": (4, 1)},
            r"sigma: expected a range \(low, high\) of numbers within \[0.001, 1000\], got \(4, 1",
        ),
        ("GB", {"sigma": "wide"}, r"sigma: expected a range .* got 'wide'"),
        ("GB", {"sigma": (1, math.nan)}, "sigma: expected a range"),
        ("GB", {"size": 4}, "size: expected an odd whole number, got 4"),
        ("MB", {"length": (7, 7.5)}, "length: expected a range .* of whole numbers"),
        ("JP", {"quality": (0, 10)}, r"quality: expected a range .* of whole numbers within \[1, 100\]"),
        ("JP", {"subsampling": "4:1:1"}, "subsampling: expected one of 4:4:4, 4:2:2, 4:2:0, got '4:1:1'"),
        ("SR", {"methods": ["lanczos"]}, "methods: expected some of nearest, bilinear, bicubic"),
        ("RL", {"ramp": 3}, "ramp: expected a whole number of at least 4, got 3"),
        ("SP", {"amount": 1.5}, r"amount: expected a range .* within \[0, 1\], got 1.5"),
    ],
)
def test_what_is_no_degradation(name, settings, message):
    with pytest.raises(ValueError, match=message):
        create(name, **settings)


def test_a_generator_is_asked_for():
    with pytest.raises(TypeError, match="generator: expected a torch.Generator or a seed, got Generator"):
        create("GN")(images(), np.random.default_rng(0))
    with pytest.raises(TypeError, match="generator: expected a torch.Generator or a seed, got NoneType"):
        create("GN")(images(), None)


def test_records_that_do_not_fit():
    batch = images(2)
    _, applied = create("GB")(batch, 0)
    with pytest.raises(ValueError, match="applied: expected a record for each of 2 images, got 1"):
        apply(batch, applied[:1])
    with pytest.raises(ValueError, match="kind: expected one of GB, .*, got 'XX'"):
        apply(batch, [Applied("XX", {})] * 2)
    with pytest.raises(ValueError, match="record: expected a kind"):
        Applied.from_dict({"sigma": 3})


def test_drawn_parameters_fill_their_ranges():
    """Both ends are reached within 2% of the range, and the middle of 2000 draws lies where it should (5 sigma)."""
    draws = generator(3)
    for kind, cls in REGISTRY.items():
        records = [cls().draw(64, 64, draws).values for _ in range(2000 if kind != "IN" else 300)]
        for name in ("sigma", "length", "angle", "radius", "scale", "quality", "gamma", "noise", "beta", "light"):
            if name not in records[0]:
                continue
            low, high = getattr(cls(), name)
            found = np.array([record[name] for record in records], float)
            assert low <= found.min() <= low + 0.02 * (high - low) and high >= found.max() >= high - 0.02 * (high - low)
            assert abs(found.mean() - (low + high) / 2) <= 5 * (high - low) / math.sqrt(12 * len(records))
    counts = [len(record["lines"]) for record in records if "lines" in record]
    assert not counts or set(counts) == set(range(5, 11))


# Blur


def moments(kernel):
    """Sum, and the second moments along rows and columns."""
    steps = torch.arange(len(kernel), dtype=torch.float64) - len(kernel) // 2
    return float(kernel.sum()), float((kernel.sum(1) * steps**2).sum()), float((kernel.sum(0) * steps**2).sum())


def test_gaussian_kernels():
    for sigma in (1.0, 1.7, 2.0):
        total, down, right = moments(gaussian_kernel(sigma))
        assert total == pytest.approx(1, abs=1e-14)
        assert math.sqrt(down) == pytest.approx(sigma, rel=0.01) and math.sqrt(right) == pytest.approx(sigma, rel=0.01)
    one = np.exp(-((np.arange(15) - 7.0) ** 2) / (2 * 4.0**2))
    expected = np.outer(one, one) / one.sum() ** 2
    np.testing.assert_allclose(gaussian_kernel(4.0).numpy(), expected, rtol=1e-13)


@pytest.mark.parametrize("angle", (0.0, 0.3, math.pi / 4, 1.2, math.pi / 2, 2.9))
def test_motion_kernels_are_as_long_as_they_say_and_lie_at_the_angle(angle):
    for length in (7, 12, 25):
        kernel = motion_kernel(length, angle)
        steps = torch.arange(len(kernel), dtype=torch.float64) - len(kernel) // 2
        along = steps[:, None] * math.sin(angle) + steps[None, :] * math.cos(angle)
        across = steps[None, :] * math.sin(angle) - steps[:, None] * math.cos(angle)
        assert float(kernel.sum()) == pytest.approx(1, abs=1e-14)
        # a line of this length has the variance length^2 / 12; of equal taps in a row, (length^2 - 1) / 12
        in_a_row = angle in (0.0, math.pi / 2)
        assert math.sqrt(12 * float((kernel * along**2).sum()) + in_a_row) == pytest.approx(length, rel=0.0105)
        assert float((kernel * across**2).sum()) < 0.2 and abs(float((kernel * across * along).sum())) < 0.04
    if angle == 0:
        expected = np.pad(np.full((1, 9), 1 / 9), ((6, 6), (2, 2)))
        np.testing.assert_allclose(motion_kernel(9, angle).numpy(), expected, rtol=1e-15)


def test_defocus_kernels():
    for radius in (1.0, 1.5, 2.7, 4.0):
        total, down, right = moments(defocus_kernel(radius))
        assert total == pytest.approx(1, abs=1e-14)
        assert down == pytest.approx(right, rel=1e-12)
        peak = float(defocus_kernel(radius).max())  # of a pixel that the disc covers
        assert math.sqrt(1 / (math.pi * peak)) == pytest.approx(radius, rel=0.001)
    # of the four neighbours, a disc of radius 1 covers what lies within it and between +-1/2 and the diagonals
    half = 0.5 * math.sqrt(0.75) + math.asin(0.5) - 0.5
    assert float(defocus_kernel(1.0)[1, 0]) == pytest.approx(half / math.pi, rel=0.002)
    # the circle crosses the corner pixels
    kernel = defocus_kernel(2.3)
    assert kernel.shape == (5, 5) and 0 < kernel[0, 0] < kernel[0, 1] < kernel[0, 2] < kernel[2, 2]


def test_the_ringing_kernel_is_the_formula():
    special = pytest.importorskip("scipy.special")
    steps = np.arange(15) - 7.0
    r = np.hypot(steps[:, None], steps[None, :])
    r[7, 7] = 1
    kernel = 1.2 * special.j1(1.2 * r) / (2 * np.pi * r)
    kernel[7, 7] = 1.2**2 / (4 * np.pi)
    np.testing.assert_allclose(ringing_kernel(1.2).numpy(), kernel / kernel.sum(), rtol=0, atol=1e-15)


def test_ringing_by_the_long_form_with_the_padded_kernel():
    ndimage = pytest.importorskip("scipy.ndimage")
    batch = images(1, dtype=torch.float64)
    padded = np.pad(ringing_kernel(1.2).numpy(), 3)
    expected = [ndimage.convolve(channel, padded, mode="mirror") for channel in batch[0].numpy()]
    result, applied = create("RI", rounded=False)(batch, 0)
    np.testing.assert_allclose(result[0].numpy(), np.clip(expected, 0, 1), rtol=0, atol=1e-14)
    assert applied[0].values == {"cutoff": 1.2, "size": 15} and len(padded) == 21


def test_convolution_mirrors_borders_as_numpy_does():
    ndimage = pytest.importorskip("scipy.ndimage")
    rng = np.random.default_rng(0)
    for shape in ((9, 23), (4, 3), (1, 6)):
        image, kernel = rng.random((2, *shape)), rng.random((7, 7))
        padded = np.pad(image, [(0, 0), (3, 3), (3, 3)], mode="reflect")
        assert np.array_equal(mirrored(torch.from_numpy(image), 3).numpy(), padded)
        expected = [ndimage.convolve(channel, kernel, mode="constant")[3:-3, 3:-3] for channel in padded]
        found = convolve(torch.from_numpy(image), torch.from_numpy(kernel))
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    flat = convolve(torch.full((3, 20, 20), 0.4), gaussian_kernel(3.0))
    assert (flat - 0.4).abs().max() < 1e-6


def long_richardson_lucy(image):
    """The released code's way: ramps of 7 pixels, then one iteration of the textbook."""
    signal = pytest.importorskip("scipy.signal")
    padded = np.pad(image, 7, mode="linear_ramp", end_values=0)
    psf = np.full((5, 5), 1 / 25)
    start = np.full_like(padded, 0.5)
    estimate = signal.convolve(start, psf, mode="same", method="direct") + 1e-12
    return (start * signal.convolve(padded / estimate, psf[::-1, ::-1], mode="same", method="direct"))[7:-7, 7:-7]


def test_richardson_lucy_is_the_long_form():
    batch = images(1, 33, 47, dtype=torch.float64)
    result, _ = create("RL", rounded=False)(batch, 0)
    for channel, expected in zip(result[0].numpy(), map(long_richardson_lucy, batch[0].numpy()), strict=True):
        np.testing.assert_allclose(channel, expected, rtol=0, atol=2e-12)


# Noise


@pytest.mark.parametrize("sigma", (10, 25, 50))
def test_gaussian_noise_has_the_stated_strength(sigma):
    result, applied = create("GN", sigma=sigma)(plain(0.5), 0)
    error = (result - 0.5) * 255
    low, high = np.quantile(error.numpy(), [0.158655, 0.841345])  # clipping at 2.5 sigma does not move these
    assert (high - low) / 2 == pytest.approx(sigma, rel=0.01) and abs(float(error.mean())) < sigma / 100
    if sigma < 50:
        assert float(error.std()) == pytest.approx(sigma, rel=0.01)
    assert applied[0].values["sigma"] == sigma
    channels = error[0].flatten(1)
    assert torch.corrcoef(channels).fill_diagonal_(0).abs().max() < 0.02  # each channel has noise of its own


@pytest.mark.parametrize(("level", "value"), [(2.0, 0.5), (2.0, 0.2), (1.5, 0.3)])
def test_poisson_noise_has_the_variance_of_its_counts(level, value):
    result, _ = create("PO", level=level, rounded=False)(plain(value), 0)
    peak = 10**level
    assert float(result.mean()) == pytest.approx(value, rel=0.01)
    assert float(result.std()) == pytest.approx(math.sqrt(value / peak), rel=0.01)
    counts = result * peak
    assert (counts - counts.round()).abs().max() < 1e-9
    dark, _ = create("PO")(plain(0.0, 8), 0)
    assert not dark.any()


def test_poisson_noise_does_not_depend_on_how_many_grey_levels_there_are():
    two_tone = plain(0.5)
    two_tone[..., 0] = 1.0
    result, _ = create("PO", rounded=False)(two_tone, 0)
    assert float(result[..., 1:].std()) == pytest.approx(math.sqrt(0.5 / 100), rel=0.01)


def test_salt_and_pepper():
    size = 1024
    result, _ = create("SP")(torch.full((1, 3, size, size), 100 / 255), 0)
    salt, pepper = (result == 1).all(1), (result == 0).all(1)
    kept = (result == torch.tensor(100 / 255)).all(1)
    assert (salt | pepper | kept).all()
    assert float((salt | pepper).double().mean()) == pytest.approx(0.05, rel=0.015)  # a million pixels: 3.4 sigma
    assert float(salt.double().sum()) == pytest.approx(float(pepper.double().sum()), rel=0.03)
    none, _ = create("SP", amount=0)(images(), 0)
    assert torch.equal(none, images())


# Sampling


def test_super_resolution_is_interpolation():
    batch = images(1)
    for method in ("nearest", "bilinear", "bicubic"):
        result, applied = create("SR", scale=0.3, methods=(method,), rounded=False)(batch, 0)
        mode = {"mode": "nearest-exact"} if method == "nearest" else {"mode": method, "antialias": True}
        small = F.interpolate(batch, (12, 17), **mode)
        assert torch.equal(result, F.interpolate(small, (40, 56), **mode).clamp(0, 1))
        assert applied[0].values == {"scale": 0.3, "down": method, "up": method, "antialias": True}
    whole, _ = create("SR", scale=1)(batch, 0)
    assert torch.equal(whole, batch)
    methods = {(a.values["down"], a.values["up"]) for a in create("SR")(images(60, 8, 8), 0)[1]}
    assert len(methods) == 9


def test_super_resolution_does_not_move_the_image():
    """The centre of a bright square stays where it is, whatever the method."""
    batch = torch.zeros(1, 3, 64, 64)
    batch[..., 16:40, 24:48] = 1
    steps = torch.arange(64.0)
    for method in ("nearest", "bilinear", "bicubic"):
        result, _ = create("SR", scale=0.5, methods=method)(batch, 0)
        mean = result[0, 0] / result[0, 0].sum()
        assert float((mean.sum(1) * steps).sum()) == pytest.approx(27.5, abs=0.1)
        assert float((mean.sum(0) * steps).sum()) == pytest.approx(35.5, abs=0.1)


def test_jpeg_is_pillows():
    Image = pytest.importorskip("PIL.Image")
    batch = images(1)
    pixels = np.rint(batch[0].numpy() * 255).astype(np.uint8).transpose(1, 2, 0)
    for quality, subsampling in ((10, "4:2:0"), (40, "4:4:4")):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=subsampling)
        expected = np.asarray(Image.open(file)).transpose(2, 0, 1)
        result, _ = create("JP", quality=quality, subsampling=subsampling)(batch, 0)
        assert np.array_equal(np.rint(result[0].numpy() * 255).astype(np.uint8), expected)


def test_painted_segments_have_the_stated_thickness_and_one_colour():
    line = {"white": True, "lines": [[-500.0, 60.3, 700.0, 60.3, 7]]}
    painted = apply(torch.zeros(1, 3, 128, 128), [Applied("IN", line)])
    assert painted.sum() == 3 * 7 * 128 and set(painted.unique().tolist()) == {0.0, 1.0}
    slanted = {"white": False, "lines": [[-800.0, -1000.0, 1224.0, 1436.0, 8]]}
    left = apply(torch.ones(1, 3, 512, 512), [Applied("IN", slanted)])
    inside = 512 * math.hypot(2024, 2436) / 2436 * 8  # from the upper to the lower border
    # the line crosses 512 rows within the columns
    assert float((1 - left[0, 0]).sum()) == pytest.approx(inside, rel=0.01)
    grey = torch.full((40, 3, 64, 64), 0.5)
    results, applied = create("IN", rounded=False)(grey, 0)
    for result, record in zip(results, applied, strict=True):
        assert set(result.unique().tolist()) == {0.5, float(record.values["white"])}
        assert all(5 <= line[4] <= 10 for line in record.values["lines"])
    assert {record.values["white"] for record in applied} == {True, False}
    assert {len(record.values["lines"]) for record in applied} == set(range(5, 11))


# CDD11's recipe


def guided_by_numpy(image, guide, epsilon):
    height, width = image.shape

    def mean(values):
        padded = np.pad(values, 1, mode="reflect")
        return sum(padded[i : i + height, j : j + width] for i in range(3) for j in range(3)) / 9

    a = (mean(guide * image) - mean(guide) * mean(image)) / (mean(guide**2) - mean(guide) ** 2 + epsilon)
    return mean(a) * guide + mean(mean(image) - a * mean(guide))


def test_the_guided_filter():
    rng = np.random.default_rng(0)
    image, guide = rng.random((2, 12, 15))
    found = guided_filter(torch.from_numpy(image)[None], torch.from_numpy(guide)[None])[0]
    np.testing.assert_allclose(found.numpy(), guided_by_numpy(image, guide, 0.01), rtol=1e-10)


def test_low_light_is_the_recipe():
    batch = images(1, dtype=torch.float64)
    illumination = torch.rand(1, 1, 40, 56, dtype=torch.float64, generator=generator(2))
    grey = np.tensordot([0.299, 0.587, 0.114], batch[0].numpy(), 1)
    light = guided_by_numpy(grey, illumination[0, 0].numpy(), 0.01) + 1e-7
    maps = {"illumination": illumination}
    result, _ = create("low", gamma=2.5, noise=0, rounded=False)(batch, 0, maps)
    np.testing.assert_allclose(result[0].numpy(), np.clip(batch[0].numpy() / light * light**2.5, 0, 1), atol=1e-12)
    unchanged, _ = create("low", gamma=1, noise=0)(batch, 0, maps)
    assert torch.equal(unchanged, batch)


@pytest.mark.parametrize("gamma", (2.0, 2.5, 3.0))
def test_low_light_has_the_stated_gamma_and_noise(gamma):
    """A grey patch of value v becomes v^gamma: its illumination is v."""
    still, _ = create("low", gamma=gamma, noise=0, rounded=False)(plain(0.7), 0)
    assert math.log(float(still.mean())) / math.log(0.7) == pytest.approx(gamma, rel=0.01)
    noisy, _ = create("low", gamma=gamma, noise=0.05)(plain(0.8), 0)
    assert float((noisy - 0.8**gamma).std()) == pytest.approx(0.05, rel=0.01)


def test_haze_is_the_recipe():
    batch = images(1, dtype=torch.float64)
    depth = torch.rand(1, 1, 40, 56, dtype=torch.float64, generator=generator(2))
    result, _ = create("haze", beta=1.5, light=0.8, rounded=False)(batch, 0, {"depth": depth})
    padded = np.pad(depth[0, 0].numpy(), ((11, 10), (11, 10)), mode="reflect")
    smooth = sum(padded[i : i + 40, j : j + 56] for i in range(22) for j in range(22)) / 484
    through = np.exp(-1.5 * np.minimum(1 - smooth, 0.7))
    np.testing.assert_allclose(result[0].numpy(), batch[0].numpy() * through + 0.8 * (1 - through), atol=1e-12)
    near, _ = create("haze")(batch, 0, {"depth": torch.ones(1, 1, 40, 56)})
    assert torch.equal(near, batch)
    far, _ = create("haze", beta=2, light=0.9)(plain(0.0, 64), 0, {"depth": torch.zeros(1, 1, 64, 64)})
    assert float(far.mean()) == pytest.approx(0.9 * (1 - math.exp(-2 * 0.7)), abs=0.5 / 255)


def test_rain_and_snow_are_the_recipe():
    batch = images(1, dtype=torch.float64)
    mask = torch.rand(1, 1, 40, 56, dtype=torch.float64, generator=generator(2))
    rain, _ = create("rain", rounded=False)(batch, 0, {"rain": mask})
    assert torch.equal(rain, (batch + mask).clamp(0, 1))
    snow, _ = create("snow", rounded=False)(batch, 0, {"snow": mask.numpy()})
    assert torch.equal(snow, batch * (1 - mask) + mask)


def test_compositions_are_their_steps():
    batch = images(1)
    composed, applied = create("low_haze_snow", rounded=False)(batch, 3)
    steps = applied[0].values["steps"]
    assert [step["kind"] for step in steps] == ["LO", "SN", "HA"] and applied[0].kind == "LO+SN+HA"
    by_hand = batch
    for step in steps:
        by_hand = apply(by_hand, [Applied.from_dict({**step, "rounded": False})])
    assert torch.equal(composed, by_hand)
    assert create("low_haze").takes == ("illumination", "depth")


def test_maps_that_do_not_fit():
    with pytest.raises(ValueError, match=r"maps\['depth'\]: expected \[2, 1, 40, 56\], got \[1, 1, 40, 56\]"):
        create("haze")(images(), 0, {"depth": torch.zeros(1, 1, 40, 56)})
    with pytest.raises(TypeError, match=r"maps\['depth'\]: expected float32 or float64, got int64"):
        create("haze")(images(), 0, {"depth": torch.zeros(2, 1, 40, 56, dtype=torch.int64)})
    with pytest.raises(ValueError, match="maps: expected some of depth, illumination, rain, snow, got 'deph'"):
        create("haze")(images(), 0, {"deph": torch.zeros(2, 1, 40, 56)})


def test_scenes_that_are_made_up():
    rng = np.random.default_rng(0)
    depth = np.mean([made_up_depth(40, 30, rng) for _ in range(50)], (0, 2))
    assert depth[-5:].mean() > 0.8 and depth[:5].mean() < 0.2  # near below, far above
    snow = [snow_flakes(64, 48, rng) for _ in range(20)]
    assert all(0 <= one.min() and one.max() <= 1 and one.dtype == np.float32 for one in snow)
    assert 0.005 < np.mean(snow) < 0.2
    assert made_up_depth(1, 1, rng).shape == snow_flakes(1, 1, rng).shape == (1, 1)


# Mixtures


def test_mixtures_draw_each_kind_as_often():
    mixture = create_from(["GB", {"kind": "GN", "sigma": 25}, "low+haze"])
    draws = generator(0)
    found = [mixture.draw(8, 8, draws) for _ in range(900)]
    counts = {kind: sum(record.kind == kind for record in found) for kind in ("GB", "GN", "LO+HA")}
    assert sum(counts.values()) == 900 and all(abs(count - 300) < 5 * math.sqrt(200) for count in counts.values())
    assert {record.values["sigma"] for record in found if record.kind == "GN"} == {25.0}
    everything = create_from("all")
    assert isinstance(everything, Mixture) and [each.kind for each in everything.kinds] == list(ELEVEN)
    assert isinstance(create_from("low+haze"), Composition) and create_from(everything) is everything


def test_descriptions_that_are_none():
    for wrong, message in (
        ({"sigma": 3}, "kind: expected the name of a degradation beside its settings"),
        ([], "kind: expected a name, a mapping with kind, or a list of these, got \\[\\]"),
        (3, "kind: expected a name, a mapping with kind, or a list of these, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            create_from(wrong)
    with pytest.raises(ValueError, match="steps: a mixture cannot be a step"):
        Composition((create_from("all"),))
    with pytest.raises(ValueError, match="kinds: expected at least one degradation"):
        Mixture(())


def test_box_means_of_even_size_reach_further_up_and_left():
    image = torch.zeros(1, 9, 9, dtype=torch.float64)
    image[0, 4, 4] = 1
    found = box_mean(image, 4)[0].nonzero()
    assert found.min() == 3 and found.max() == 6  # pixel 6 reaches up to 4, pixel 3 down to 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("kind", ALL)
def test_on_a_gpu_everything_but_noise_is_that_of_the_cpu(kind):
    batch = images()
    on_cpu, records = create(kind)(batch, 4)
    on_gpu, of_gpu = create(kind)(batch.cuda(), 4)
    assert of_gpu == records and on_gpu.is_cuda
    assert torch.equal(on_gpu, create(kind)(batch.cuda(), 4)[0])
    noisy = any(part in kind.split("+") for part in ("GN", "PO", "SP", "LO", "low")) or kind.startswith("low")
    difference = (on_gpu.cpu() - on_cpu).abs()
    assert (difference.max() > 0.02) if noisy else (difference.max() <= 1.01 / 255 and difference.mean() < 1e-4)
