"""The kernels of whole stages in Triton, called directly: images of any size would reach them on a GPU."""

from functools import cache, partial
from importlib import import_module

import pytest
import test_feed_forward_stage as ffn
import test_mixer_stage as mixer
import torch
from harness import (
    ON_GPU,
    ROUNDING_NOISE,
    device_of,
    dtypes_of,
    random_like,
    relative_error,
    require,
    unavoidable,
)

import mirage_kernels
from mirage_kernels import MixerWeights
from mirage_kernels.feed_forward_stage.weights import FeedForwardWeights, Form
from mirage_kernels.mixer_stage import composite as mixer_composite
from mirage_kernels.mixer_stage.weights import LEARNED, Statistics

pytestmark = [pytest.mark.gpu] if ON_GPU else []
DTYPES = dtypes_of("triton")
IMAGES = ((5, 7), (1, 1), (1, 19), (18, 1), (4, 18))  # the last two have more than one tile in rows and columns
LAYOUTS = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.mT.contiguous().mT,
    "sliced": lambda t: torch.nn.functional.pad(t, (1, 2, 3, 1, 2, 1), value=float("nan"))[:, 2:-1, 3:-1, 1:-2],
    "unaligned": lambda t: torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape),
    "expanded": lambda t: t[:1].expand(2, -1, -1, -1),
}

def slow(test):
    """In the interpreter, a minute or so."""
    return test if ON_GPU else pytest.mark.slow(test)


@pytest.fixture(autouse=True)
def _poisoned_allocations(monkeypatch):
    """What a kernel leaves unwritten in its results is NaN."""
    require("triton")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # As on a GPU also in the interpreter, where tiles would be large: small ones, and sums in several parts.
    monkeypatch.setattr("mirage_kernels._triton.tiles.FILL", 256)
    yield
    torch.use_deterministic_algorithms(False)


def kernels(stage):
    """The module, once it is known that Triton is there."""
    return import_module(f"mirage_kernels.{stage}.triton")


def tensors_of(make, shape, dtype):
    return [t.to(device_of("triton"), dtype) for t in make(shape, torch.Generator().manual_seed(0))]


def far_apart(x):
    """The values of x [1, 3, H, W], its channels 2^30 elements apart."""
    (_, _, height, width), between = x.shape, 2**30
    torch.utils.deterministic.fill_uninitialized_memory = False  # addresses alone, where there is no GPU
    memory = torch.empty(2 * between + height * width, dtype=x.dtype, device=x.device)
    torch.utils.deterministic.fill_uninitialized_memory = True
    return memory.as_strided(x.shape, (2 * between, between, width, 1)).copy_(x)


def assert_close(value, eager, truth, dtype, name="y"):
    """As close to the truth as eager: twice its error in float32, its error in 16 bit."""
    assert value.isfinite().all() and value.shape == truth.shape, name
    factor = 2 if dtype == torch.float32 else ROUNDING_NOISE
    allowed = max(factor * relative_error(eager, truth), unavoidable(truth.cpu(), dtype))
    assert relative_error(value, truth) <= allowed, name


@pytest.mark.parametrize("image", [*IMAGES, (1080, 1920)], ids=str)
def test_tiles_are_what_a_product_needs(image):
    """`tl.dot` takes no fewer than 16 columns on a GPU, and the interpreter takes any number."""
    stage, x = import_module("mirage_kernels._triton.tiles"), torch.empty(2, 3, *image, device="meta")
    for pixels in (16, 32, 64):
        tile = stage.image_tile(x, pixels)
        assert tile.pixels == pixels and tile.block_w <= 32
        rows, columns = -(-image[0] // tile.block_h), -(-image[1] // tile.block_w)
        assert tile.programs(x) == 2 * rows * columns
        assert 16 <= stage.filling_tile(x, pixels).pixels <= pixels


class TestFeedForward:
    def check(self, x, weights):
        y = kernels("feed_forward_stage").forward(x, FeedForwardWeights(*weights), Form(1e-5))
        truth = ffn.reference(x.double(), *(w.double() for w in weights))
        eager = ffn.reference(x, *(w.to(x.dtype) for w in weights))
        assert y.dtype == x.dtype and y.is_contiguous()
        assert_close(y, eager, truth, x.dtype)
        return y

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("image", IMAGES, ids=str)
    def test_truth(self, image, dtype):
        x, *weights = tensors_of(ffn.cases.make, (2, 6, *image), dtype)
        self.check(x, weights)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("channels", [1, 17, 48, 130])
    def test_channels(self, channels, dtype):
        """One channel, no multiple of a block, one block of many, more than a program normalises at a time."""
        x, *weights = tensors_of(partial(ffn.cases.make, ratio=1), (1, channels, 4, 5), dtype)
        self.check(x, weights)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layout(self, layout):
        x, *weights = tensors_of(ffn.cases.make, (2, 6, 7, 9), torch.float32)
        strided = LAYOUTS[layout](x)
        before = strided.clone()
        y = self.check(strided, weights)
        plain = self.check(before.contiguous(), weights)
        assert torch.equal(y, plain) and torch.equal(strided, before)

    def test_weights_of_another_dtype(self):
        """As under autocast: the products are of the dtype of x."""
        x, *weights = tensors_of(ffn.cases.make, (1, 6, 5, 7), torch.float32)
        y = self.check(x.to(torch.float16), weights)
        assert y.dtype == torch.float16

    def test_not_finite(self):
        """A pixel reaches its own 3x3 neighbourhood and no further."""
        x, *weights = tensors_of(ffn.cases.make, (1, 6, 9, 20), torch.float32)
        clean = self.check(x, weights)
        for poison in (float("nan"), float("inf")):
            x[0, 2, 4, 15] = poison
            y = kernels("feed_forward_stage").forward(x, FeedForwardWeights(*weights), Form(1e-5))
            near = torch.zeros(9, 20, dtype=torch.bool, device=x.device)
            near[3:6, 14:17] = True
            assert torch.equal(y[..., ~near], clean[..., ~near]) and not y[..., near].isfinite().any()

    def test_dispatch(self, monkeypatch):
        """The operator runs the kernels from as many tiles on as fill a GPU, and composites for smaller images."""
        module = kernels("feed_forward_stage")
        project_out = torch.empty(6, 8, 1, 1)
        assert module.forward_problem(torch.empty(1, 6, 64, 64), project_out, False) == ""
        tensors = [t.requires_grad_() for t in tensors_of(ffn.cases.make, (1, 3, 3, 4), torch.float32)]
        too_small = "its kernels want an image that fills a GPU, not 1 of 3 x 4 pixels"
        assert module.forward_problem(tensors[0], tensors[-1], False) == too_small
        results = []
        for fill in (256, 1):
            monkeypatch.setattr("mirage_kernels._triton.tiles.FILL", fill)
            with mirage_kernels.use("triton"):
                results.append(ffn.evaluate(mirage_kernels.feed_forward_stage, tensors))
            reasons = [mirage_kernels.why_not(f"feed_forward_stage{d}").get("triton") for d in ("", "_backward")]
            assert reasons == ([too_small] * 2 if fill == 256 else [None] * 2)
        assert module.forward_problem(tensors[0], tensors[-1], False) == ""
        assert "no hidden tensor" in module.forward_problem(tensors[0], tensors[-1], True)
        for fused, composite in zip(*results, strict=True):
            assert relative_error(fused, composite) < 1e-6
        wide = torch.empty(1, 300, 512, 512, device="meta")
        assert module.forward_problem(wide, project_out, False) == "its kernels hold up to 256 channels of x, not 300"
        half = torch.empty(1, 256, 512, 512, device="meta", dtype=torch.float16)
        assert module.backward_problem(half, project_out, False) == ""
        assert module.backward_problem(torch.empty(1, 129, 512, 512, device="meta"), project_out, False).endswith(
            "its backward holds up to 128 channels, not 129"
        )

    def test_deterministic(self):
        x, *weights = tensors_of(ffn.cases.make, (2, 6, 9, 11), torch.float32)
        assert torch.equal(self.check(x, weights), self.check(x, weights))

    def test_offsets_past_32_bits(self):
        """Channels 2^30 elements apart: each stride fits 32 bits, their multiples do not."""
        x, *weights = tensors_of(ffn.cases.make, (1, 3, 4, 5), torch.float16)
        assert torch.equal(self.check(far_apart(x), weights), self.check(x, weights))


class TestFeedForwardGradient:
    """Of x and of the five weights."""

    shape = (2, 6, 7, 9)

    @pytest.fixture
    def compare(self, monkeypatch):
        """What every operator has to show of one problem, whatever its number of tiles."""
        for name in ("forward_problem", "backward_problem"):
            monkeypatch.setattr(kernels("feed_forward_stage"), name, lambda *call: "")
        tests = ffn.TestFeedForwardStage()

        def compare(shape, dtype, **options):
            inputs = tensors_of(partial(ffn.cases.make, **options), shape, dtype)
            with mirage_kernels.use("triton"):
                tests.compare([t.requires_grad_() for t in inputs], "triton")

        return compare

    def gradients(self, x, weights, grad_y):
        results = kernels("feed_forward_stage").backward(grad_y, x, FeedForwardWeights(*weights), Form(1e-5))
        assert all(g.dtype == t.dtype and g.is_contiguous() for g, t in zip(results, (x, *weights), strict=True))
        return results

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("image", IMAGES, ids=str)
    def test_truth(self, image, dtype, compare):
        compare((2, 6, *image), dtype)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("channels", [1, 17, 48, 130])
    def test_channels(self, channels, dtype, compare):
        compare((1, channels, 4, 5), dtype, ratio=1)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layout(self, layout):
        x, *weights = tensors_of(ffn.cases.make, self.shape, torch.float32)
        strided, grad_y = LAYOUTS[layout](x), LAYOUTS[layout](random_like(x))
        before = grad_y.clone()
        results = self.gradients(strided, weights, grad_y)
        plain = self.plain(layout == "expanded")
        assert all(torch.equal(a, b) for a, b in zip(results, plain, strict=True)) and torch.equal(grad_y, before)

    @classmethod
    @cache
    def plain(cls, expanded):
        """Of contiguous tensors with the values that those of every other layout have as well."""
        x, *weights = tensors_of(ffn.cases.make, cls.shape, torch.float32)
        values = [LAYOUTS["expanded"](t).contiguous() if expanded else t for t in (x, random_like(x))]
        return cls().gradients(values[0], weights, values[1])

    def test_parts(self, monkeypatch):
        """Weights' gradients in parts, or all tiles in one program: the same sums."""
        x, *weights = tensors_of(ffn.cases.make, (2, 6, 5, 20), torch.float32)
        many = self.gradients(x, weights, random_like(x))
        monkeypatch.setattr("mirage_kernels._triton.tiles.FILL", 1)
        one = self.gradients(x, weights, random_like(x))
        assert all(relative_error(a, b) < 1e-6 for a, b in zip(many, one, strict=True))

    def test_weights_of_another_dtype(self):
        """As under autocast: gradients in the dtype of each weight."""
        x, *weights = tensors_of(ffn.cases.make, (1, 6, 5, 7), torch.float32)
        grad_y = random_like(x)
        mixed = self.gradients(x.to(torch.float16), weights, grad_y.to(torch.float16))
        assert all(relative_error(a, b) < 4e-3 for a, b in zip(mixed, self.gradients(x, weights, grad_y), strict=True))

    def test_not_finite(self):
        """A gradient that is not finite reaches the 3x3 neighbourhood of its pixel, and every weight."""
        x, *weights = tensors_of(ffn.cases.make, (1, 6, 9, 20), torch.float32)
        grad_y = random_like(x)
        clean = self.gradients(x, weights, grad_y)[0]
        grad_y[0, 2, 4, 15] = float("nan")
        grad_x, *grads = self.gradients(x, weights, grad_y)
        near = torch.zeros(9, 20, dtype=torch.bool, device=x.device)
        near[3:6, 14:17] = True
        assert torch.equal(grad_x[..., ~near], clean[..., ~near]) and not grad_x[..., near].isfinite().any()
        assert not any(g.isfinite().all() for g in grads)

    def test_deterministic(self):
        x, *weights = tensors_of(ffn.cases.make, (2, 6, 9, 11), torch.float32)
        first, second = (self.gradients(x, weights, random_like(x)) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def test_offsets_past_32_bits(self):
        x, *weights = tensors_of(ffn.cases.make, (1, 3, 4, 5), torch.float16)
        grad_y = random_like(x)
        results = self.gradients(far_apart(x), weights, far_apart(grad_y))
        plain = self.gradients(x, weights, grad_y)
        assert all(torch.equal(a, b) for a, b in zip(results, plain, strict=True))


class TestMixer:
    def check(self, x, weights, scale=None, training=False):
        y, statistics = kernels("mixer_stage").forward(x, weights, scale, training, 1e-5, 1e-5)
        exact = MixerWeights(*(t.double() for t in weights))
        scale64 = None if scale is None else scale.double()
        truth = mixer.reference(x.double(), exact, scale64, training)
        eager = mixer.reference(x, MixerWeights(*(t.to(x.dtype) for t in weights)), scale, training)
        assert y.dtype == x.dtype and y.is_contiguous()
        assert_close(y, eager.y, truth.y, x.dtype)
        _, expected = mixer_composite.forward(x.double(), exact, scale64, training, 1e-5, 1e-5, "composite")
        for name, value, peer in zip(Statistics._fields, statistics, expected, strict=True):
            assert value.shape == peer.shape and value.dtype == torch.float32, name
            assert relative_error(value, peer) < (5e-7 if x.dtype == torch.float32 else 2e-2), name
        return y, statistics

    def inputs(self, shape, dtype=torch.float32):
        x, *learned = tensors_of(mixer.cases.make, shape, dtype)
        return x, mixer.cases.with_statistics(learned)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("image", IMAGES, ids=str)
    def test_truth(self, image, training, dtype):
        x, weights = self.inputs((2, 12, *image, 2), dtype)
        scale = torch.tensor([1.25, 0.0]).to(x) if training else None
        self.check(x, weights, scale, training)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("channels, heads", [(3, 1), (30, 1), (60, 2), (96, 4)])
    def test_channels(self, channels, heads, dtype):
        """One channel a branch; those of the networks, whose heads and hidden channels are no multiple of a block."""
        self.check(*self.inputs((1, channels, 3, 5, heads), dtype))

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layout(self, layout):
        x, weights = self.inputs((2, 12, 5, 7, 2))
        strided = LAYOUTS[layout](x)
        before = strided.clone()
        y, _ = self.check(strided, weights)
        assert torch.equal(y, self.check(before.contiguous(), weights)[0]) and torch.equal(strided, before)

    @pytest.mark.parametrize("training", [False, True])
    def test_deterministic(self, training):
        x, weights = self.inputs((2, 12, 5, 7, 2))
        (y, first), (z, second) = (self.check(x, weights, None, training) for _ in range(2))
        assert torch.equal(y, z) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def test_sums_of_many_parts(self, monkeypatch):
        x, weights = self.inputs((2, 12, 5, 7, 2))
        y, _ = self.check(x, weights)
        monkeypatch.setattr(import_module("mirage_kernels.mixer_stage.triton.forward"), "MOST_PARTS", 1)
        assert relative_error(self.check(x, weights)[0], y) < 1e-6

    def test_moments_of_a_large_offset(self):
        """The variance of values far from zero: a constant added to a channel by the norm's bias changes none."""
        x, weights = self.inputs((2, 12, 5, 7, 2))
        far = weights._replace(norm_bias=weights.norm_bias + 30)
        _, near = self.check(x, weights, None, True)
        _, statistics = kernels("mixer_stage").forward(x, far, None, True, 1e-5, 1e-5)
        torch.testing.assert_close(statistics.batch_var, near.batch_var, rtol=1e-5, atol=0)

    def test_dispatch(self):
        """The operator runs the kernels where they hold a pixel's channels and those of a head."""
        module, (_, weights) = kernels("mixer_stage"), self.inputs((1, 12, 3, 4, 2))

        def problem(shape, heads, dtype=torch.float32):
            w = weights._replace(temperature=torch.empty(heads, 1, 1))
            assert module.backward_problem(x := torch.empty(shape, dtype=dtype), w) == module.forward_problem(x, w)
            return module.forward_problem(x, w)

        assert problem((1, 12, 3, 4), 2) == ""
        assert problem((1, 12, 0, 4), 2) == "x has no elements"
        assert problem((1, 192, 3, 4), 1) == "its kernels hold up to 96 channels of x in torch.float32, not 192"
        assert problem((1, 192, 3, 4), 8, torch.float16) == ""
        assert problem((1, 192, 3, 4), 1, torch.float16) == "its kernels hold up to 32 channels of a head, not 64"
        wide = "its kernels hold up to 384 channels of x in torch.float16, not 387"
        assert problem((1, 387, 3, 4), 129, torch.float16) == wide

    def test_offsets_past_32_bits(self):
        x, weights = self.inputs((1, 3, 4, 5, 1), torch.float16)
        assert torch.equal(self.check(far_apart(x), weights)[0], self.check(x, weights)[0])


class TestMixerGradient:
    """Of x and of the weights that have gradients."""

    def check(self, shape, dtype, training=False):
        tests = mixer.TestTraining() if training else mixer.TestEval()
        inputs = [t.requires_grad_() for t in tensors_of(mixer.cases.make, shape, dtype)]
        with mirage_kernels.use("triton"):
            tests.compare(inputs, "triton")

    def gradients(self, x, weights, grad_y, training=False):
        module, scale = kernels("mixer_stage"), torch.tensor([1.25, 0.0])[: x.shape[0]].to(x) if training else None
        _, statistics = module.forward(x, weights, scale, training, 1e-5, 1e-5)
        used = weights._replace(bn_mean=statistics.batch_mean, bn_var=statistics.batch_var)
        results = module.backward(grad_y, x, used, scale, statistics, training, 1e-5, 1e-5)
        peers = (x, *(getattr(weights, name) for name in LEARNED))
        for result, peer in zip(results, peers, strict=True):
            assert result.shape == peer.shape and result.dtype == peer.dtype and result.is_contiguous()
        return results

    def inputs(self, shape=(2, 6, 3, 7, 2), dtype=torch.float32):
        x, *learned = tensors_of(mixer.cases.make, shape, dtype)
        return x, mixer.cases.with_statistics(learned), random_like(x)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("training", [False, True])
    def test_truth(self, training, dtype):
        self.check((2, 6, 3, 7, 2), dtype, training)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("image", [(5, 7), (1, 1), (4, 18), (18, 1)], ids=str)
    @slow
    def test_images(self, image, training, dtype):
        self.check((2, 12, *image, 2), dtype, training)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("channels, heads", [(3, 1), (60, 2), (96, 4)])
    @slow
    def test_channels(self, channels, heads, dtype):
        self.check((1, channels, 3, 5, heads), dtype)

    @pytest.mark.parametrize("layout", LAYOUTS if ON_GPU else ["sliced", "expanded"])
    def test_layout(self, layout):
        x, weights, grad_y = self.inputs()
        strided, grad_y = LAYOUTS[layout](x), LAYOUTS[layout](grad_y)
        before = grad_y.clone()
        results = self.gradients(strided, weights, grad_y)
        plain = self.plain(layout == "expanded")
        assert all(torch.equal(a, b) for a, b in zip(results, plain, strict=True)) and torch.equal(grad_y, before)

    @classmethod
    @cache
    def plain(cls, expanded):
        """Of contiguous tensors with the values that those of every other layout have as well."""
        x, weights, grad_y = cls().inputs()
        values = [LAYOUTS["expanded"](t).contiguous() if expanded else t for t in (x, grad_y)]
        return cls().gradients(values[0], weights, values[1])

    def test_wide_maps(self):
        """Backward writes maps of more channels than x, 16 here: offsets are of 64 bits where those need them."""
        plan_of = import_module("mirage_kernels.mixer_stage.triton.plan").plan_of
        _, weights, _ = self.inputs((1, 12, 1, 1, 2), torch.float16)
        weights = MixerWeights(*(t.to("meta") for t in weights))
        limit = 2**31 - 1
        for pixels, wide in ((limit // 16, False), (limit // 16 + 1, True), (limit // 12, True)):
            x = torch.empty(1, 12, 1, pixels, device="meta", dtype=torch.float16)
            assert x.numel() <= limit and plan_of(x, weights).wide is wide

    def test_parts(self, monkeypatch):
        """Sums in parts, or of tiles as large as a program holds: the same gradients."""
        x, weights, grad_y = self.inputs((2, 3, 5, 7, 1))
        many = self.gradients(x, weights, grad_y, training=True)
        monkeypatch.setattr("mirage_kernels._triton.tiles.FILL", 1)
        few = self.gradients(x, weights, grad_y, training=True)
        assert all(relative_error(a, b) < 5e-6 for a, b in zip(many, few, strict=True))

    def test_weights_of_another_dtype(self):
        """As under autocast: gradients in the dtype of each weight."""
        x, weights, grad_y = self.inputs()
        exact = self.plain(False)
        mixed = self.gradients(x.to(torch.float16), weights, grad_y.to(torch.float16))
        for name, result, peer in zip(("x", *LEARNED), mixed, exact, strict=True):
            assert relative_error(result, peer) < 1e-2, name

    def test_deterministic(self):
        first, second = (self.gradients(*self.inputs(), training=True) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def test_offsets_past_32_bits(self):
        x, weights, grad_y = self.inputs((1, 3, 4, 5, 1), torch.float16)
        results, plain = (self.gradients(t, weights, grad_y) for t in (far_apart(x), x))
        assert all(torch.equal(a, b) for a, b in zip(results, plain, strict=True))


class TestProductOverPixels:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("rows, columns", [(1, 1), (3, 40), (65, 8)])
    def test_truth(self, rows, columns, dtype):
        left, right = (tensors_of(lambda s, g: (torch.randn(s, generator=g),), (2, n, 9, 11), dtype)[0]
                       for n in (rows, columns))  # fmt: skip
        result = import_module("mirage_kernels._triton.weight_gradient").product_over_pixels(left, right)
        truth = torch.einsum("brhw,bshw->rs", left.double(), right.double())
        assert result.dtype == torch.float32 and relative_error(result, truth) < 3e-7

    @pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "expanded"])
    def test_layout(self, layout):
        product = import_module("mirage_kernels._triton.weight_gradient").product_over_pixels
        left, right = tensors_of(lambda s, g: torch.randn(s, generator=g).chunk(2), (4, 6, 5, 7), torch.float32)
        plain = product(left, right)
        assert torch.equal(product(LAYOUTS[layout](left), right), plain)
        assert torch.equal(product(left, LAYOUTS[layout](right)), plain)
