"""The loss terms against their definitions, the presets, and what is refused."""

import math

import pytest
import torch
from golden import load_golden_weights, mirage_mini

from mirage.losses import MirageLoss, fourier_loss, l1_loss, spd_contrastive_loss


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.rand(2, 3, 6, 8, dtype=torch.float64, generator=generator) for _ in range(2))


def unit(rows: int, seed: int) -> torch.Tensor:
    x = torch.randn(rows, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(x, dim=-1)


def test_l1(pair) -> None:
    a, b = pair
    torch.testing.assert_close(l1_loss(a, b), (a - b).abs().mean())


def test_fourier_by_the_sum_of_definition(pair) -> None:
    a, b = pair
    d = a - b
    h, w = 6, 8
    rows = torch.exp(-2j * math.pi * torch.outer(torch.arange(h), torch.arange(h)) / h).to(torch.complex128)
    columns = torch.exp(-2j * math.pi * torch.outer(torch.arange(w), torch.arange(w // 2 + 1)) / w).to(torch.complex128)
    spectrum = rows @ d.to(torch.complex128) @ columns
    expected = (spectrum.real.abs().mean() + spectrum.imag.abs().mean()) / 2
    torch.testing.assert_close(fourier_loss(a, b), expected, rtol=1e-6, atol=0)


def test_fourier_gradient(pair) -> None:
    a, b = pair
    assert torch.autograd.gradcheck(lambda x: fourier_loss(x, b), (a.requires_grad_(),), eps=1e-7, atol=1e-5)


def test_contrastive_by_its_definition() -> None:
    z_s, z_l = unit(5, 1), unit(5, 2)
    expected = 0.0
    for i in range(5):
        scores = [float(z_s[i] @ z_l[j]) / 0.2 for j in range(5)]
        expected -= math.log(math.exp(scores[i]) / sum(math.exp(s) for s in scores)) / 5
    assert float(spd_contrastive_loss(z_s, z_l, temperature=0.2)) == pytest.approx(expected, rel=1e-12)


def test_contrastive_extremes() -> None:
    identity = torch.eye(4)
    assert float(spd_contrastive_loss(identity, identity)) == pytest.approx(math.log(1 + 3 * math.exp(-10)), rel=1e-3)
    assert float(spd_contrastive_loss(unit(1, 1), unit(1, 2))) == 0.0
    same = unit(1, 3).expand(4, 16)
    assert float(spd_contrastive_loss(same, same)) == pytest.approx(math.log(4), rel=1e-12)


@pytest.mark.parametrize(("preset", "weight"), [("paper", 0.05), ("released", 0.01)])
def test_presets(preset: str, weight: float, pair) -> None:
    restored, target = pair
    z = (unit(2, 1), unit(2, 2))
    total, terms = MirageLoss(preset)((restored, z), target)
    assert terms._fields == ("l1", "fourier", "contrastive")
    torch.testing.assert_close(terms.contrastive, spd_contrastive_loss(*z, temperature=0.1))
    expected = l1_loss(restored, target) + 0.1 * fourier_loss(restored, target) + weight * spd_contrastive_loss(*z)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)


def test_default_preset_and_overrides(pair) -> None:
    restored, target = pair
    loss = MirageLoss(fourier_weight=0.0, contrastive_weight=0.0)
    assert loss.preset == "paper" and MirageLoss().contrastive_weight == 0.05
    total, terms = loss(restored, target)
    torch.testing.assert_close(total, l1_loss(restored, target))
    assert float(terms.contrastive) == 0.0


def test_trains_the_model_through_every_parameter() -> None:
    model = load_golden_weights(mirage_mini()).train()
    x, target = torch.rand(2, 3, 16, 24), torch.rand(2, 3, 16, 24)
    total, _ = MirageLoss("released")(model(x, return_spd=True), target)
    total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_is_widened(dtype: torch.dtype, pair) -> None:
    restored, target = (t.to(dtype) for t in pair)
    z = tuple(unit(2, s).to(dtype) for s in (1, 2))
    total, _ = MirageLoss()((restored, z), target)
    expected, _ = MirageLoss()((restored.float(), tuple(v.float() for v in z)), target.float())
    assert total.dtype == torch.float32 and torch.equal(total, expected)


def test_autocast_does_not_narrow() -> None:
    z = (unit(4, 1).float(), unit(4, 2).float())
    expected = spd_contrastive_loss(*z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(spd_contrastive_loss(*z), expected)


def test_refusals(pair) -> None:
    restored, target = pair
    with pytest.raises(ValueError, match=r"same shape, got \(2, 3, 6, 8\) and \(1, 3, 6, 8\)"):
        l1_loss(restored, target[:1])
    with pytest.raises(ValueError, match="same shape"):
        fourier_loss(restored, target[..., :4])
    with pytest.raises(ValueError, match=r"must both be \[B, D\]"):
        spd_contrastive_loss(unit(2, 1), unit(3, 1))
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        spd_contrastive_loss(unit(2, 1), unit(2, 1), temperature=0)
    with pytest.raises(ValueError, match="one of .'paper', 'released'., got 'mine'"):
        MirageLoss("mine")
    with pytest.raises(ValueError, match="return_spd=True"):
        MirageLoss()(restored, target)
