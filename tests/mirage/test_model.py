"""The reference network's own behaviour: arguments, errors, stochastic depth, the SPD head, and each block's maths."""

import copy
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from golden import load_golden_weights, mirage_mini
from torch import Tensor, nn

from mirage import MIRAGE, mirage_small, mirage_tiny
from mirage.blocks import (
    Attention,
    Downsample,
    DropPath,
    FeedForward,
    GatedCNNBlock,
    LayerNorm,
    SPDCovariance,
    TransformerBlock,
    Upsample,
    l2_normalize,
)


def test_parameter_counts() -> None:
    assert sum(p.numel() for p in mirage_tiny().parameters()) == 6_207_412
    assert sum(p.numel() for p in mirage_small().parameters()) == 9_678_983


def test_overrides_reach_the_model() -> None:
    model = mirage_tiny(num_refinement_blocks=1, drop_path=0.25, in_channels=1)
    assert len(model.refinement) == 1 and model.config["dim"] == 24
    assert model.latent[0].attn.gatedcnn.drop_path.drop_prob == 0.25
    assert model.output.out_channels == model.patch_embed.proj.in_channels == 1
    assert isinstance(mirage_mini(drop_path=0.0).latent[0].attn.gatedcnn.drop_path, nn.Identity)


def test_config_rebuilds_the_model() -> None:
    model = mirage_mini(in_channels=1, spd=False)
    again = MIRAGE(**model.config)
    shapes = [[(k, v.shape) for k, v in m.state_dict().items()] for m in (model, again)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (2, 3, 8, 24), (3, 3, 40, 16)])
def test_restored_has_the_shape_of_the_input(shape: tuple[int, ...]) -> None:
    model = load_golden_weights(mirage_mini()).eval()
    with torch.no_grad():
        restored = model(torch.rand(shape))
    assert restored.shape == shape and restored.isfinite().all()


def test_batch_entries_are_independent_in_eval() -> None:
    model = load_golden_weights(mirage_mini()).double().eval()
    x = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        whole = model(x)
        parts = torch.cat([model(x[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(whole, parts, rtol=1e-11, atol=1e-11)


def test_spd_embeddings() -> None:
    model = load_golden_weights(mirage_mini()).eval()
    x = torch.rand(2, 3, 16, 24)
    with torch.no_grad():
        restored, (z_s, z_l) = model(x, return_spd=True)
        assert torch.equal(restored, model(x))
    for z in (z_s, z_l):
        assert z.shape == (2, 64)
        torch.testing.assert_close(z.norm(dim=-1), torch.ones(2))


def test_spd_head_runs_only_when_asked_for() -> None:
    model = mirage_mini().eval()
    calls: list[str] = []
    for name in ("reduce_shallow", "reduce_latent", "spd_covariance", "spd_proj_shallow", "spd_proj_latent"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    with torch.no_grad():
        model(torch.rand(1, 3, 16, 16))
        assert calls == []
        model(torch.rand(1, 3, 16, 16), return_spd=True)
    assert sorted(set(calls)) == sorted(
        ["reduce_shallow", "reduce_latent", "spd_covariance", "spd_proj_shallow", "spd_proj_latent"]
    )


def test_spd_covariance_can_be_replaced() -> None:
    model = load_golden_weights(mirage_mini()).eval()
    names = list(model.state_dict())
    shapes: list[torch.Size] = []

    class Recorder(SPDCovariance):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            shapes.append(x.shape)
            return super().forward(x)

    model.spd_covariance = Recorder(model.spd_covariance.eps)
    model(torch.rand(2, 3, 16, 24), return_spd=True)
    assert [tuple(s) for s in shapes] == [(2, 12, 16, 24), (2, 24, 2, 3)]
    assert list(model.state_dict()) == names


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 16, 16), r"\[B, 3, H, W\].*, got \(3, 16, 16\)"),
        ((1, 4, 16, 16), r"\[B, 3, H, W\].*, got \(1, 4, 16, 16\)"),
        ((0, 3, 16, 16), r"B at least 1, got \(0, 3, 16, 16\)"),
        ((1, 3, 17, 16), "multiples of 8, got 17x16"),
        ((1, 3, 16, 20), "multiples of 8, got 16x20"),
        ((1, 3, 0, 8), "multiples of 8, got 0x8"),
    ],
)
def test_wrong_input(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mirage_mini()(torch.rand(shape))


def test_return_spd_needs_the_head_and_two_positions() -> None:
    with pytest.raises(ValueError, match="spd=True"):
        mirage_mini(spd=False).eval()(torch.rand(1, 3, 16, 16), return_spd=True)
    with pytest.raises(ValueError, match="at least 2 positions"):
        mirage_mini().eval()(torch.rand(1, 3, 8, 8), return_spd=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 20}, "dim must be a positive multiple of 6.*got 20"),
        ({"dim": 0}, "dim must be a positive multiple of 6.*got 0"),
        ({"heads": (3, 1, 2, 4)}, r"3 \* num_heads|multiple of 9"),
        ({"heads": (1, 1, 2, 5)}, r"dim \* 8 must be a positive multiple of 15"),
        ({"heads": (1, 1, 2)}, "heads must be 4"),
        ({"heads": (0, 1, 2, 4)}, "heads must be 4"),
        ({"num_blocks": (1, 1, 1)}, "num_blocks must be 4"),
        ({"num_refinement_blocks": -1}, "num_refinement_blocks"),
        ({"out_channels": 1}, r"out_channels must equal in_channels \(3\).*got 1"),
        ({"in_channels": 0}, "in_channels must be positive"),
        ({"drop_path": 1.0}, r"drop_prob must be in \[0, 1\)"),
        ({"ffn_expansion_factor": 0.0}, "at least 1"),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
def test_wrong_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mirage_mini(**arguments)


def test_training_is_reproducible_by_seed() -> None:
    model = load_golden_weights(mirage_mini(drop_path=0.5)).train()
    x = torch.rand(4, 3, 16, 16)

    def run(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return model(x).detach()

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_drop_path_is_per_sample_and_unbiased() -> None:
    torch.manual_seed(0)
    drop = DropPath(0.25).train()
    x = torch.rand(4000, 2, 3, 1) + 1
    ratio = (drop(x) / x).flatten(1)
    assert torch.equal((ratio == 0).any(1), (ratio == 0).all(1)), "a sample is kept or dropped as a whole"
    kept = torch.tensor(1 / 0.75)
    assert torch.all((ratio == 0) | torch.isclose(ratio, kept))
    assert abs(float((ratio[:, 0] == 0).float().mean()) - 0.25) < 0.03
    assert drop.eval()(x) is x


def test_dropped_branch_leaves_the_shortcut() -> None:
    block = load_golden_weights(GatedCNNBlock(6, drop_path=0.999)).train()
    torch.manual_seed(0)
    x = torch.randn(2, 6, 8, 8)
    torch.testing.assert_close(block(x), block.proj_out(x))


def test_layer_norm_is_that_of_pytorch() -> None:
    norm = load_golden_weights(LayerNorm(6)).double()
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    expected = F.layer_norm(x.permute(0, 2, 3, 1), (6,), norm.body.weight, norm.body.bias, 1e-5).permute(0, 3, 1, 2)
    torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=1e-12)
    assert norm(x).is_contiguous()


def test_dynamic_conv_uses_each_samples_kernels() -> None:
    block = load_golden_weights(GatedCNNBlock(6)).double()
    x = torch.randn(3, 6, 9, 5, dtype=torch.float64)
    expected = torch.cat(
        [F.conv2d(s, block.kernel_generator(s).reshape(6, 1, 7, 7), padding=3, groups=6) for s in x.split(1)]
    )
    torch.testing.assert_close(block.dynamic_conv(x), expected, rtol=1e-12, atol=1e-12)


def test_channel_attention_by_loops() -> None:
    attention = load_golden_weights(Attention(18, 2)).double()
    x = torch.randn(2, 6, 3, 5, dtype=torch.float64)
    q, k, v = attention.qkv_dwconv(attention.qkv(x)).chunk(3, dim=1)
    expected = torch.empty_like(v)
    for b in range(2):
        for head in range(2):
            part = slice(3 * head, 3 * head + 3)
            qs, ks = (t[b, part].flatten(1) for t in (q, k))
            cosine = torch.stack([torch.stack([F.cosine_similarity(i, j, dim=0) for j in ks]) for i in qs])
            weights = (cosine * attention.temperature[head, 0, 0]).softmax(-1)
            expected[b, part] = torch.einsum("ij,jhw->ihw", weights, v[b, part])
    torch.testing.assert_close(attention.channel_attention(x), expected, rtol=1e-12, atol=1e-12)


def test_spd_covariance_is_that_of_pytorch() -> None:
    x = torch.randn(2, 5, 4, 3, dtype=torch.float64) + 100
    expected = torch.stack([torch.cov(s.flatten(1)) for s in x]) + 1e-3 * torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(SPDCovariance(eps=1e-3)(x), expected, rtol=1e-11, atol=1e-11)
    with pytest.raises(ValueError, match="at least three dimensions"):
        SPDCovariance()(torch.rand(2, 3))


def test_samplers_and_feed_forward_shapes() -> None:
    x = torch.rand(2, 12, 6, 10)
    assert Downsample(12)(x).shape == (2, 24, 3, 5)
    assert Upsample(12)(x).shape == (2, 6, 12, 20)
    assert FeedForward(12, 1.5)(x).shape == x.shape
    with pytest.raises(ValueError, match="dim must be a positive multiple of 2"):
        Downsample(5)
    with pytest.raises(ValueError, match="num_heads must be positive"):
        Attention(12, 0)


def test_block_is_the_same_on_any_memory_layout() -> None:
    block = load_golden_weights(TransformerBlock(24, 2)).double().eval()
    x = torch.randn(2, 24, 8, 6, dtype=torch.float64)
    expected = block(x)
    big = torch.randn(2, 30, 8, 6, dtype=torch.float64)
    big[:, 3:27] = x
    for other in (x.contiguous(memory_format=torch.channels_last), big[:, 3:27], x.transpose(2, 3).contiguous().mT):
        assert torch.equal(other, x)
        torch.testing.assert_close(block(other), expected, rtol=1e-12, atol=1e-12)


def test_block_of_an_empty_batch() -> None:
    block = TransformerBlock(24, 2).eval()
    assert block(torch.rand(0, 24, 8, 6)).shape == (0, 24, 8, 6)


def test_block_gradients() -> None:
    block = load_golden_weights(TransformerBlock(6, 1, drop_path=0.0)).double().train()
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, (x,), fast_mode=True)


def test_input_is_left_alone() -> None:
    model = load_golden_weights(mirage_mini()).train()
    x = torch.rand(2, 3, 16, 16, requires_grad=True)
    before = x.detach().clone()
    model(x, return_spd=True)[0].sum().backward()
    assert torch.equal(x, before) and x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision(dtype: torch.dtype) -> None:
    model = load_golden_weights(mirage_mini()).eval()
    torch.manual_seed(0)
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        expected = model(x)
        actual = model.to(dtype)(x.to(dtype))
    assert actual.dtype == dtype
    # Measured over four images: 1.2e-2 to 1.6e-2 (bf16) and 1.4e-3 to 1.8e-3 (fp16), that is up to 2 eps.
    assert float((actual - expected).norm() / expected.norm()) < 4 * torch.finfo(dtype).eps


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _off(value: Tensor, truth: Tensor) -> float:
    """Relative error."""
    return float((value.double() - truth.double()).norm() / truth.double().norm())


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("side", [512, 2048])
def test_normalisation_of_large_planes(side: int, strided: bool) -> None:
    """No fewer digits than of a small plane: `F.normalize` is off by 2e-4 and 2e-3 here (constant planes)."""
    planes = torch.stack((torch.full((side * side,), 0.7), torch.rand(side * side, generator=_generator())))
    planes = (planes.mT.contiguous().mT if strided else planes).requires_grad_()
    truth = planes.detach().double().requires_grad_()
    weight = torch.randn(planes.shape, generator=_generator())
    for x in (planes, truth):
        (l2_normalize(x) * weight.to(x.dtype)).sum().backward()
    assert _off(l2_normalize(planes).detach(), F.normalize(truth, dim=-1).detach()) < 2e-7
    assert _off(planes.grad, truth.grad) < 5e-7


@pytest.mark.parametrize("side", [512, 2048])
def test_attention_of_a_large_plain_image(side: int) -> None:
    """Cosines of 1 and -1, whose softmax a norm's error reaches undiminished: 3e-5 and 2e-5 with `F.normalize`."""
    torch.manual_seed(0)
    attention = Attention(12, num_heads=1)
    with torch.no_grad():
        attention.temperature.fill_(2)
        attention.qkv_dwconv.weight.zero_()[..., 1, 1] = 1  # no edges: q, k and v are plain as well
        x = torch.full((1, 4, side, side), 0.7)
        truth = copy.deepcopy(attention).double().channel_attention(x.double())
        assert _off(attention.channel_attention(x), truth) < 1e-6


@pytest.mark.parametrize("size", [0.0, 1e-13, 1e-11, 3.0])
def test_normalisation_is_that_of_pytorch(size: float) -> None:
    """Also where the norm is below 1e-12: the division is then by a constant, in the gradient too."""
    x = torch.full((2, 4), size, dtype=torch.float64)
    x[:, 1] *= -2
    results = []
    for function in (l2_normalize, partial(F.normalize, dim=-1)):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        (y * torch.arange(1.0, 9.0).view(2, 4)).sum().backward()
        results.append((y.detach(), leaf.grad))
    (ours, our_grad), (theirs, their_grad) = results
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    torch.testing.assert_close(our_grad, their_grad, rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_normalisation_in_16_bit(dtype: torch.dtype) -> None:
    """Zero, and values whose squares float16 has not."""
    x = torch.stack((torch.zeros(4096), torch.full((4096,), 1e-4), torch.full((4096,), 300.0))).to(dtype)
    expected = torch.stack((torch.zeros(4096), *torch.full((2, 4096), 1 / 64)))
    torch.testing.assert_close(l2_normalize(x), expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)


def _fit(model: MIRAGE, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The restored image and all gradients in one vector, in float64."""
    restored = model(x)
    (restored.double() - target).square().mean().backward()
    grads = [p.grad.flatten().double() for p in model.parameters() if p.grad is not None]
    return restored.detach().double(), torch.cat(grads)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_black_image_in_float16(autocast: bool) -> None:
    """All activations are zero: what is divided by a norm has none. Result and gradients are as close as those of
    another image."""
    torch.manual_seed(1)
    model = MIRAGE(dim=12, num_blocks=(1, 1, 1, 1), num_refinement_blocks=1, heads=(1, 1, 2, 2), drop_path=0.0)
    target = torch.rand(1, 3, 32, 32, generator=_generator()).double()
    grad_errors = []
    for x in (torch.rand(1, 3, 32, 32, generator=_generator()), torch.zeros(1, 3, 32, 32)):
        truth, true_grads = _fit(copy.deepcopy(model).double(), x.double(), target)
        narrow = copy.deepcopy(model) if autocast else copy.deepcopy(model).half()
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            restored, grads = _fit(narrow, x if autocast else x.half(), target)
        assert restored.isfinite().all() and grads.isfinite().all()
        assert (restored - truth).norm() <= 2e-3 * max(truth.norm(), 1)
        grad_errors.append(_off(grads, true_grads))
    assert grad_errors[1] <= 2 * grad_errors[0] < 4e-3


def test_import_needs_no_kernels() -> None:
    code = (
        "import sys, mirage; mirage.mirage_tiny; "
        "bad = {'mirage_kernels', 'triton', 'einops', 'timm', 'rich', 'matplotlib'} & set(sys.modules); "
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_names_are_attribute_errors() -> None:
    import mirage

    assert mirage.blocks.TransformerBlock is TransformerBlock
    with pytest.raises(AttributeError, match="no attribute 'nothing_of_this_name'"):
        _ = mirage.nothing_of_this_name
