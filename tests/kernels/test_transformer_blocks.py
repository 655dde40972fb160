"""transformer_blocks: both stages of each block, all as one operator of the C++ library where no gradient is wanted."""

import pytest
import torch
from harness import device_of, each_of, in_float64, relative_error, require, unavoidable
from torch.utils.flop_counter import FlopCounterMode

import mirage_kernels
from mirage_kernels import (
    BlockWeights,
    FeedForwardWeights,
    MixerWeights,
    PackedBlocks,
    feed_forward_stage,
    mixer_stage,
    transformer_blocks,
)
from mirage_kernels.feed_forward_stage.cases import make as make_feed_forward
from mirage_kernels.mixer_stage.cases import make as make_mixer
from mirage_kernels.mixer_stage.cases import with_statistics
from mirage_kernels.mixer_stage.weights import LEARNED
from mirage_kernels.transformer_blocks import reference

IMPLEMENTATIONS = ("cpp", "composite", "torch")
SMALL = (2, 12, 5, 7, 2)
# Odd sizes, one pixel, one tile and many, planes of one line, several strips of tiles, an empty batch.
SHAPES = [
    SMALL,
    (1, 3, 1, 1, 1),
    (3, 6, 9, 7, 1),
    (1, 24, 130, 226, 1),
    (2, 96, 41, 129, 4),
    (1, 6, 700, 40, 2),
    (1, 48, 40, 420, 2),
    (0, 6, 5, 7, 1),
]


def make(shape, dtype=torch.float32, device="cpu"):
    """x and the weights, for a shape (B, C, H, W, heads)."""
    generator = torch.Generator().manual_seed(0)
    x, *learned = (t.to(device, dtype) for t in make_mixer(shape, generator))
    feed_forward = FeedForwardWeights(*(t.to(x) for t in make_feed_forward(shape[:4], generator)[1:]))
    return x, with_statistics(learned), feed_forward


def transformer_block(x, mixer, feed_forward, *eps):
    return transformer_blocks(x, [BlockWeights(mixer, feed_forward, *eps)])


def halves(x, *blocks):
    for mixer, feed_forward, norm1_eps, bn_eps, norm2_eps in blocks:
        x = mixer_stage(x, mixer, norm_eps=norm1_eps, bn_eps=bn_eps).y
        x = feed_forward_stage(x, *feed_forward, eps=norm2_eps)
    return x


def several(shape, count, dtype=torch.float32):
    """x and `count` blocks of different weights and epsilons."""
    x, mixer, feed_forward = make(shape, dtype)
    blocks = []
    for i in range(count):
        scaled = (type(half)(*(w * (1 + 0.1 * i) for w in half if w is not None)) for half in (mixer, feed_forward))
        blocks.append(BlockWeights(*scaled, 1e-5 * (i + 1), 2e-5, 1e-4 * (i + 1)))
    return x, blocks


impl = each_of(IMPLEMENTATIONS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("threads", "count"), [(1, 1), (2, 1), (2, 2), (2, 3)])
def test_the_bits_of_the_stages(shape, dtype, threads, count):
    """Written over the sum between the halves: no tile reads what a neighbour has written, in whatever order they run.
    x stays as it is, however many blocks take turns with two maps."""
    require("cpp")
    x, blocks = several(shape, count, dtype)
    kept, before = x.clone(), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with mirage_kernels.use("cpp"), torch.no_grad():
            expected = halves(x, *blocks)
            value = transformer_blocks(x, blocks)
    finally:
        torch.set_num_threads(before)
    assert value.dtype == dtype and value.is_contiguous()
    assert torch.equal(value, expected)
    assert torch.equal(x, kept)
    assert mirage_kernels.last_used("transformer_blocks") == "cpp"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [SMALL, (1, 24, 33, 47, 1), (1, 96, 13, 30, 4)], ids=str)
def test_as_exact_as_eager(impl, shape, dtype):
    if impl == "torch":
        pytest.skip("is eager")
    x, mixer, feed_forward = make(shape, dtype, device_of(impl))
    flat = [x, *mixer, *feed_forward[:5]]
    wide = [t.detach() for t in in_float64(flat)]
    count = len(mixer)
    exact = BlockWeights(MixerWeights(*wide[1 : 1 + count]), FeedForwardWeights(*wide[1 + count :]))
    truth = reference(wide[0], [exact])
    eager = relative_error(reference(x, [BlockWeights(mixer, feed_forward)]), truth)
    with torch.no_grad():
        value = transformer_block(x, mixer, feed_forward)
    assert relative_error(value, truth) <= max((2 if dtype == torch.float32 else 1) * eager, unavoidable(truth, dtype))


def test_epsilons_reach_their_norms(impl):
    arguments = make(SMALL, torch.float64)
    with torch.no_grad():
        for eps in ((0.5, 1e-5, 1e-5), (1e-5, 0.5, 1e-5), (1e-5, 1e-5, 0.5)):
            value = transformer_block(*arguments, *eps)
            x, *weights = arguments
            assert relative_error(value, reference(x, [BlockWeights(*weights, *eps)])) < 1e-12
            assert relative_error(value, reference(x, [BlockWeights(*weights)])) > 1e-3


def test_gradients_are_those_of_the_stages(impl):
    x, mixer, feed_forward = make(SMALL, torch.float64)
    learned = [x, *(getattr(mixer, name) for name in LEARNED), *feed_forward[:5]]
    for tensor in learned:
        tensor.requires_grad_()
    block = BlockWeights(mixer, feed_forward)
    values = transformer_blocks(x, [block, block]), halves(x, block, block)
    results = [torch.autograd.grad(value.square().sum(), learned) for value in values]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with torch.no_grad():
        assert not transformer_blocks(x, [block]).requires_grad


def test_packed_blocks(impl):
    """The same blocks as two lists: for the operator, its gradients and whoever goes through them."""
    x, blocks = several(SMALL, 3)
    weights = [t for block in blocks for half in block[:2] for t in half if t is not None]
    packed = PackedBlocks(weights, [e for block in blocks for e in block[2:]])
    with torch.no_grad():
        assert torch.equal(transformer_blocks(x, packed), transformer_blocks(x, blocks))
    x.requires_grad_()
    results = [torch.autograd.grad(transformer_blocks(x, b).sum(), x)[0] for b in (packed, blocks)]
    assert torch.equal(*results)
    assert len(packed) == 3 and isinstance(packed[0].feed_forward, FeedForwardWeights)
    for found, block in ((packed[-1], blocks[2]), (packed[1:2][0], blocks[1]), *zip(packed, blocks, strict=True)):
        assert found[2:] == block[2:] and isinstance(found.mixer, MixerWeights)
        assert all(a is b for i in (0, 1) for a, b in zip(found[i], block[i], strict=True))
    with pytest.raises(IndexError):
        packed[3]
    with pytest.raises(ValueError, match="expected 26 tensors and 3 numbers for each block, got 77 and 9"):
        PackedBlocks(weights[1:], packed.eps)
    with pytest.raises(ValueError, match="dwconv: expected"):
        transformer_blocks(x, PackedBlocks([*weights[:24], x, *weights[25:]], packed.eps))
    for absent in range(26):
        with pytest.raises(TypeError, match="^[a-z0-9_]+: expected a tensor, got NoneType"):
            transformer_blocks(x, PackedBlocks([None if i == absent else t for i, t in enumerate(weights)], packed.eps))
    with pytest.raises(ValueError, match="blocks: expected at least one"):
        transformer_blocks(x, PackedBlocks([], []))


@pytest.mark.parametrize("which", ["x", "weights"])
def test_the_operator_alone_has_gradients(which):
    """As in a program that was recorded where none was wanted."""
    require("cpp")
    x, mixer, feed_forward = make(SMALL)
    wanted = (x if which == "x" else feed_forward.dwconv).requires_grad_()
    with mirage_kernels.use("torch"):
        expected = transformer_blocks(x, [BlockWeights(mixer, feed_forward, 1e-5, 1e-5, 1e-5)])
    arguments = x, [*mixer, *feed_forward[:5]], [1e-5, 1e-5, 1e-5], "cpp"
    y = torch.ops.mirage_kernels.transformer_blocks(*arguments)
    found, right = (torch.autograd.grad(result.square().mean(), wanted)[0] for result in (y, expected))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        assert not torch.ops.mirage_kernels.transformer_blocks(*arguments).requires_grad


def test_strides(impl):
    """Of x any; of the weights too, which are copied then."""
    x, mixer, feed_forward = make((2, 12, 9, 11, 2), torch.float64)
    with torch.no_grad():
        expected = transformer_block(x, mixer, feed_forward)
        wide = torch.randn(2, 12, 18, 33, dtype=x.dtype)[:, :, ::2, ::3]
        wide.copy_(x)
        for other in (x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).clone().transpose(2, 3), wide):
            value = transformer_block(other, mixer, feed_forward)
            assert relative_error(value, expected) < 1e-13 and value.shape == expected.shape
            assert value.stride() == (other if other.is_contiguous(memory_format=torch.channels_last) else x).stride()
        spread = MixerWeights(*(torch.stack((w, w), -1)[..., 0] for w in mixer))
        turned = FeedForwardWeights(*(torch.stack((w, w), -1)[..., 1] for w in feed_forward[:5]))
        assert not spread.qkv.is_contiguous() and not turned.dwconv.is_contiguous()
        assert relative_error(transformer_block(x, spread, turned), expected) < 1e-13
        repeated = transformer_block(x[:1].expand(3, -1, -1, -1), mixer, feed_forward)
        assert all(relative_error(sample, expected[0]) < 1e-13 for sample in repeated)


def test_weights_of_other_dtypes(impl):
    if impl == "torch":
        pytest.skip("PyTorch's convolutions want one dtype")
    x, mixer, feed_forward = make(SMALL)
    mixed = MixerWeights(*(w.bfloat16() for w in mixer)), FeedForwardWeights(*(w.half() for w in feed_forward[:5]))
    with torch.no_grad():
        value = transformer_block(x, *mixed)
        expected = transformer_block(x, *(type(half)(*(w.float() for w in half if w is not None)) for half in mixed))
    assert value.dtype == torch.float32 and relative_error(value, expected) < 1e-6


def test_autocast(impl):
    x, mixer, feed_forward = make(SMALL)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        block = BlockWeights(mixer, feed_forward)
        value, expected = transformer_blocks(x, [block, block]), halves(x, block, block)
    assert torch.equal(value, expected)
    assert value.dtype == (x.dtype if impl == "torch" else torch.bfloat16)  # eager adds x before any convolution


@pytest.mark.skipif(mirage_kernels.available()["cpp"] != "yes", reason="needs the C++ library")
def test_results_do_not_depend_on_what_the_workspace_held():
    arguments = make((1, 24, 40, 56, 2))
    results = []
    for poison in (0.0, float("nan"), 1e30):
        with torch.no_grad(), mirage_kernels.use("cpp"):
            transformer_block(torch.full_like(arguments[0], poison), *arguments[1:])
            results.append(transformer_block(*arguments))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_registered_right():
    require("cpp")
    x, mixer, feed_forward = make(SMALL)
    operator = torch.ops.mirage_kernels.transformer_blocks.default
    arguments = (x, [*mixer, *feed_forward[:5]] * 2, [1e-5] * 6, "cpp")
    torch.library.opcheck(
        operator, arguments, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )
    with pytest.raises(ValueError, match="weights: expected 52 for 2 blocks, got 51"):
        operator(x, [*mixer, *feed_forward[:5], *mixer, *feed_forward[1:5]], [1e-5] * 6, "cpp")
    with pytest.raises(ValueError, match="eps: expected three for each block, got 2"):
        operator(x, [*mixer, *feed_forward[:5]], [1e-5] * 2, "cpp")


def test_flops_are_those_of_the_stages(impl):
    x, blocks = several((1, 24, 16, 16, 2), 3)
    counts = []
    for function in (lambda: transformer_blocks(x, blocks), lambda: halves(x, *blocks)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            function()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_compiles_in_one_graph(impl):
    arguments = make(SMALL)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(transformer_block, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*arguments), transformer_block(*arguments), rtol=1e-5, atol=1e-6)


WRONG = {
    "x: expected a tensor, got list": lambda x, m, f: ([1.0], m, f),
    "x: expected float32, float64, float16 or bfloat16, got torch.int64": lambda x, m, f: (x.long(), m, f),
    "x: expected 4 dimensions, got shape": lambda x, m, f: (x[0], m, f),
    "x: expected a positive multiple of 3 channels": lambda x, m, f: (x[:, :11], m, f),
    "mixer: expected MixerWeights, got tuple": lambda x, m, f: (x, tuple(m), f),
    "feed_forward: expected FeedForwardWeights, got list": lambda x, m, f: (x, m, list(f)),
    "norm_weight: expected shape": lambda x, m, f: (x, m._replace(norm_weight=m.norm_weight[:-1]), f),
    "qkv: expected shape": lambda x, m, f: (x, m._replace(qkv=m.qkv.flatten(1)), f),
    "gic1: expected shape": lambda x, m, f: (x, m._replace(gic1=m.gic1.transpose(1, 2)), f),
    "gic2: expected 4 dimensions": lambda x, m, f: (x, m._replace(gic2=m.gic2.flatten(1)), f),
    "gic2: expected at least 4 input channels": lambda x, m, f: (x, m._replace(gic2=m.gic2[:, :3]), f),
    "qkv_dwconv: expected shape": lambda x, m, f: (x, m._replace(qkv_dwconv=m.qkv_dwconv.view(12, 9, 1, 1)), f),
    "mlp_in: expected shape": lambda x, m, f: (x, m._replace(mlp_in=m.mlp_in[..., None]), f),
    "temperature: expected a head count": lambda x, m, f: (x, m._replace(temperature=m.temperature[:0]), f),
    "temperature: expected 3 dimensions": lambda x, m, f: (x, m._replace(temperature=m.temperature.flatten()), f),
    "alpha_mlp: expected a tensor, got float": lambda x, m, f: (x, m._replace(alpha_mlp=1.0), f),
    "proj_out: expected float32": lambda x, m, f: (x, m._replace(proj_out=m.proj_out.int()), f),
    "bn_var: expected a tensor on cpu like x, got meta": lambda x, m, f: (x, m._replace(bn_var=m.bn_var.to("meta")), f),
    "project_in: expected shape": lambda x, m, f: (x, m, f._replace(project_in=f.project_in[1:])),
    "dwconv: expected shape": lambda x, m, f: (x, m, f._replace(dwconv=f.dwconv[:, :, :1])),
    "project_out: expected 4 dimensions": lambda x, m, f: (x, m, f._replace(project_out=f.project_out[..., 0])),
    "norm_bias: expected a tensor, got NoneType": lambda x, m, f: (x, m, f._replace(norm_bias=None)),
    "dwconv: expected a tensor on cpu like x, got meta": lambda x, m, f: (x, m, f._replace(dwconv=f.dwconv.to("meta"))),
}


@pytest.mark.parametrize("message", WRONG)
def test_errors_name_the_argument(impl, message):
    """The same words whichever implementation would have run, although the C++ library is asked first."""
    x, mixer, feed_forward = make(SMALL)
    with torch.no_grad(), pytest.raises((TypeError, ValueError), match=message):
        transformer_block(*WRONG[message](x, mixer, feed_forward))


def test_errors_name_what_is_no_block(impl):
    x, mixer, feed_forward = make(SMALL)
    block = BlockWeights(mixer, feed_forward)
    with torch.no_grad():
        for blocks in ([], ()):
            with pytest.raises(ValueError, match="blocks: expected at least one, got none"):
                transformer_blocks(x, blocks)
        for other in (tuple(block), None):
            with pytest.raises(TypeError, match=f"blocks: expected BlockWeights, got {type(other).__name__}"):
                transformer_blocks(x, [block, other])
        wider = block._replace(mixer=make((1, 24, 3, 3, 2))[1])
        with pytest.raises(ValueError, match=r"norm_weight: expected shape \[12\]"):
            transformer_blocks(x, [block, wider])
