"""Features of many patches in little memory: by blocks of rows, through a file, and whole."""

import numpy as np
import pytest
import torch

from mirage.grids import SRResNetDescriptor, descriptor_ggd, fit_ggd
from mirage.grids.features import BlockDescriptor, feature_gram
from mirage.grids.pca import centred_gram
from mirage.networks import create


def network(upscale=4, dim=6, dtype=torch.float64):
    torch.manual_seed(0)
    made = create("srresnet", dim=dim, num_blocks=2, upscale=upscale)
    for name, parameter in made.named_parameters():  # zero biases and small weights hide errors at borders
        if name.endswith("bias"):
            torch.nn.init.uniform_(parameter, -0.5, 0.5)
        else:
            parameter.data.mul_(8)
    return made.to(dtype)


def images(count=9, size=(7, 5), dtype=torch.float64):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(1), dtype=dtype)


class Whole:
    """A descriptor without blocks."""

    def __init__(self, inner):
        self.inner, self.seen = inner, []

    def features(self, images):
        self.seen.append(len(images))
        return self.inner.features(images)


@pytest.mark.parametrize("upscale", [1, 2, 3, 4])
@pytest.mark.parametrize("activation", [True, False])
def test_features_are_the_networks_maps_before_its_last_convolution(upscale, activation):
    made = network(upscale)
    found = SRResNetDescriptor(made, activation=activation, batch=4).features(images())
    maps = made.feature_maps(images(), activated=activation)
    assert found.shape == (9, 6 * 7 * upscale * 5 * upscale)
    torch.testing.assert_close(found, maps.detach().flatten(1), rtol=1e-13, atol=1e-13)
    assert not found.requires_grad


def test_of_the_published_size_there_are_1_048_576():
    made = create("srresnet")
    assert SRResNetDescriptor(made).features(torch.rand(1, 3, 32, 32)).shape == (1, 1_048_576)


@pytest.mark.parametrize("upscale", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 1000])
def test_blocks_are_rows_of_the_same_features(upscale, rows):
    descriptor = SRResNetDescriptor(network(upscale), batch=4)
    assert isinstance(descriptor, BlockDescriptor)
    whole = descriptor.features(images()).unflatten(1, (6, 7 * upscale, 5 * upscale))
    row = 9 * 6 * 5 * upscale * 8
    top = 0
    for block in descriptor.feature_blocks(images(), rows * row):
        maps = block.unflatten(1, (6, -1, 5 * upscale))
        assert maps.shape[2] <= rows
        torch.testing.assert_close(maps, whole[:, :, top : top + maps.shape[2]], rtol=1e-12, atol=1e-13)
        top += maps.shape[2]
    assert top == 7 * upscale


def test_a_block_is_a_row_at_least():
    descriptor = SRResNetDescriptor(network(), batch=4)
    assert sum(1 for _ in descriptor.feature_blocks(images(), 1)) == 28


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("memory", [1, 10_000, 100_000, 2**30])
def test_the_gram_matrix_is_the_same_in_whatever_memory(dtype, memory, tmp_path):
    inner = SRResNetDescriptor(network(dtype=dtype), batch=4)
    x = images().to(dtype)
    reference = SRResNetDescriptor(network()).features(x.double())
    expected = (reference - reference.mean(0)) @ (reference - reference.mean(0)).T
    atol = float(expected.abs().max()) * (1e-12 if dtype == torch.float64 else 2e-6)
    whole = Whole(inner)
    for descriptor in (inner, whole):
        found = feature_gram(descriptor, x, memory=memory, batch=4, scratch=tmp_path)
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, expected, rtol=0, atol=atol)
    assert whole.seen == [4, 4, 1]
    assert not list(tmp_path.iterdir())


def test_features_in_half_precision_are_taken():
    class Half:
        def features(self, images):
            return images.flatten(1).bfloat16()

    x = images(20)
    expected = centred_gram([x.flatten(1).bfloat16().double()])
    for memory in (1, 2**30):
        np.testing.assert_allclose(feature_gram(Half(), x, memory=memory), expected, atol=1e-5 * expected.max())


def test_the_ggd_is_that_of_all_features():
    descriptor = SRResNetDescriptor(network(), batch=4)
    x = images(40)
    expected = fit_ggd(descriptor.features(x), 12)
    for memory in (1, 50_000, 2**30):
        for each in (descriptor, Whole(descriptor)):
            found = descriptor_ggd(each, x, 12, memory=memory)
            assert found.alpha == expected.alpha
            assert found.sigma == pytest.approx(expected.sigma, rel=1e-10)
    refined = descriptor_ggd(descriptor, x, 12, refine=True, clip=None)
    full = fit_ggd(descriptor.features(x), 12, refine=True, clip=None)
    assert (refined.alpha, refined.sigma) == (pytest.approx(full.alpha, rel=1e-8), pytest.approx(full.sigma, rel=1e-10))


class Constant:
    def __init__(self, features):
        self.given = features

    def features(self, images):
        return self.given[: len(images)] if isinstance(self.given, torch.Tensor) else self.given


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (None, r"descriptor: expected floating-point features \[16, D\], got NoneType"),
        (torch.rand(16, 3, 4), r"expected floating-point features \[16, D\], got torch.float32 \[16, 3, 4\]"),
        (torch.rand(15, 30), r"\[16, D\], got torch.float32 \[15, 30\]"),
        (torch.ones(16, 30, dtype=torch.int64), "got torch.int64"),
        (torch.rand(16, 9), "expected at most as many as features, 9, got 10"),
        (torch.ones(16, 30), "expected patches that differ, got the same features of all"),
        (torch.full((16, 30), torch.nan), "expected finite numbers, got others in 20 of 20 patches"),
    ],
)
@pytest.mark.parametrize("memory", [1, 2**30])
def test_what_descriptors_return_is_checked(features, message, memory):
    with pytest.raises(ValueError, match=message):
        descriptor_ggd(Constant(features), torch.rand(20, 3, 4, 4), 10, memory=memory)


def test_bad_images_and_networks_are_refused():
    descriptor = SRResNetDescriptor(network(dtype=torch.float32))
    with pytest.raises(ValueError, match=r"images: expected \[N, 3, H, W\], got \[20, 1, 4, 4\]"):
        descriptor.features(torch.rand(20, 1, 4, 4))
    with pytest.raises(ValueError, match=r"images: expected \[N, 3, H, W\], got \[3, 4, 4\]"):
        descriptor_ggd(descriptor, torch.rand(3, 4, 4), 10)
    with pytest.raises(ValueError, match="need at least 11 patches, got 10"):
        descriptor_ggd(descriptor, torch.rand(10, 3, 4, 4), 10)
    with pytest.raises(ValueError, match="expected at most as many as features, 96, got 97"):
        descriptor_ggd(SRResNetDescriptor(network(1)), images(98, (4, 4)), 97)
    with pytest.raises(ValueError, match="expected patches that differ, got the same features of all"):
        descriptor_ggd(descriptor, torch.full((20, 3, 4, 4), 0.5), 10)
    with pytest.raises(ValueError, match="network: expected an SRResNet .*; Conv2d has no conv_first, body, conv_hr"):
        SRResNetDescriptor(torch.nn.Conv2d(3, 3, 3))
    with pytest.raises(ValueError, match="batch: expected at least 1, got 0"):
        SRResNetDescriptor(network(), batch=0)


def test_fingerprints_tell_weights_and_options():
    one = SRResNetDescriptor(network())
    assert one.fingerprint == SRResNetDescriptor(network(), batch=3).fingerprint
    assert one.fingerprint != SRResNetDescriptor(network(), activation=False).fingerprint
    other = network()
    other.conv_hr.bias.data[0] += 1e-3
    assert one.fingerprint != SRResNetDescriptor(other).fingerprint


@pytest.mark.parametrize(
    "wrap", [lambda state: state, lambda state: {"params": state}, lambda state: {"params_ema": state}]
)
def test_any_file_with_the_published_names_is_read(wrap, tmp_path):
    made = network(dtype=torch.float32)
    torch.save(wrap(made.state_dict()), tmp_path / "msrresnet.pth")
    read = SRResNetDescriptor.from_weights(tmp_path / "msrresnet.pth")
    x = images(4, (6, 6)).float()
    torch.testing.assert_close(read.features(x), SRResNetDescriptor(made).features(x), rtol=0, atol=0)
    assert read.fingerprint == SRResNetDescriptor(made).fingerprint
    before = SRResNetDescriptor.from_weights(tmp_path / "msrresnet.pth", activation=False)
    torch.testing.assert_close(before.features(x), made.feature_maps(x, activated=False).flatten(1).detach())


def test_files_of_other_networks_and_none_are_refused(tmp_path):
    torch.save(create("nafnet", width=4, encoder_blocks=[1], middle_blocks=1, decoder_blocks=[1]).state_dict(),
               tmp_path / "other.pth")  # fmt: skip
    with pytest.raises(ValueError, match="network: expected an SRResNet .*; NAFNet has no conv_first"):
        SRResNetDescriptor.from_weights(tmp_path / "other.pth")
    with pytest.raises(FileNotFoundError, match="no-such-weights"):
        SRResNetDescriptor.from_weights("no-such-weights")
    with pytest.raises(FileNotFoundError):
        SRResNetDescriptor.from_weights(tmp_path / "missing.pth")
