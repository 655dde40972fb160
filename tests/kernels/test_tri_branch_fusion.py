import attention_terms
import pytest
import torch
from harness import OperatorTests, device_of, implementations, relative_error, require

import mirage_kernels
from mirage_kernels import tri_branch_fusion
from mirage_kernels.tri_branch_fusion import cases, reference


def _terms(inputs, grad_output):
    return attention_terms.of_fusion(inputs[:3], grad_output)


class TestTriBranchFusion(OperatorTests):
    (operator,) = cases.CASES
    alias = ("conv", "mlp")
    terms = _terms


def _inputs(dtype):
    return [t.to(dtype) for t in cases.make((2, 4, 5, 7), torch.Generator().manual_seed(3))]


@pytest.mark.parametrize(
    "branches",
    [("bfloat16",) * 3, ("float16",) * 3, ("bfloat16", "float32", "float32"), ("float16", "bfloat16", "float16")],
)
@pytest.mark.parametrize("weights", ["float32", "float64", "bfloat16", "scalar"])
@pytest.mark.parametrize("impl", implementations(("cpp", "cuda")))
def test_promotes_as_the_reference(impl, branches, weights):
    require(impl)
    if impl == "cuda" and weights == "float64":
        pytest.skip("the result is float64, for which CUDA C++ has no kernels")
    tensors = [t.to(device_of(impl)) for t in _inputs(torch.float64)]
    for i, name in enumerate(branches):
        tensors[i] = tensors[i].to(getattr(torch, name))
    for i in range(3, 6):
        tensors[i] = tensors[i].float().squeeze() if weights == "scalar" else tensors[i].to(getattr(torch, weights))
    tensors = [t.requires_grad_() for t in tensors]
    with mirage_kernels.use(impl):
        out = tri_branch_fusion(*tensors)
    peer = reference(*tensors)
    truth = reference(*(t.detach().double() for t in tensors))
    assert out.dtype == peer.dtype
    assert relative_error(out, truth) <= max(1.05 * relative_error(peer, truth), torch.finfo(out.dtype).eps)
    for tensor, grad in zip(tensors, torch.autograd.grad(out.double().square().sum(), tensors), strict=True):
        assert grad.dtype == tensor.dtype and grad.shape == tensor.shape


@pytest.mark.parametrize("impl", implementations(("cpp", "cuda")))
def test_saturated_modulation(impl):
    """Sums far outside the range of exp: sigmoid is exactly 0 or 1, and the gradients stay finite."""
    require(impl)
    tensors = [t.to(device_of(impl)).requires_grad_() for t in _inputs(torch.float32)]
    with mirage_kernels.use(impl):
        for shift in (-400.0, 400.0):
            moved = [t + shift for t in tensors[:3]]
            out = tri_branch_fusion(*moved, *tensors[3:])
            assert relative_error(out, reference(*(t.double() for t in (*moved, *tensors[3:])))) < 1e-7
            assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), tensors))


def test_errors_name_the_argument():
    x, one = torch.zeros(1, 4, 2, 2), torch.ones(1)
    with pytest.raises(ValueError, match=r"conv: expected shape \[1, 4, 2, 2\].*got \[1, 3, 2, 2\]"):
        tri_branch_fusion(x, x[:, :3], x, one, one, one)
    with pytest.raises(ValueError, match=r"l_mlp: expected shape \[1\] or \[\], got \[2\]"):
        tri_branch_fusion(x, x, x, one, one, torch.ones(2))
    with pytest.raises(TypeError, match="mlp: expected float32.*got torch.int64"):
        tri_branch_fusion(x, x, x.long(), one, one, one)
