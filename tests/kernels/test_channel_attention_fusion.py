from functools import partial

import attention_terms
import pytest
import torch
from harness import OperatorTests, device_of, implementations, relative_error, require

import mirage_kernels
from mirage_kernels import channel_attention_fusion
from mirage_kernels.channel_attention import reference as attention_reference
from mirage_kernels.channel_attention.cases import call
from mirage_kernels.channel_attention_fusion import cases, reference
from mirage_kernels.tri_branch_fusion import reference as fusion_reference

public, plain = (partial(call, function) for function in (channel_attention_fusion, reference))


def _terms(inputs, grad_output):
    att = attention_reference(*inputs[:4], inputs[3].shape[0])
    terms = attention_terms.of_fusion((att, *inputs[4:6]), grad_output)
    (grad_att,) = torch.autograd.grad(fusion_reference(att, *inputs[4:]), att, grad_output)
    return terms | attention_terms.of_attention(inputs[:4], grad_att)


class TestChannelAttentionFusion(OperatorTests):
    (operator,) = cases.CASES
    alias = ("q", "conv")
    terms = _terms
    roundings = 9  # the gradient of the temperature is a number a head

    def extremes_floor(self, x):
        """Of two such numbers on constant planes eager's error may be a fifth of an epsilon, by luck."""
        return self.roundings


def _inputs(dtype, shape=(2, 8, 5, 7, 2)):
    return [t.to(dtype).requires_grad_() for t in cases.make(shape, torch.Generator().manual_seed(3))]


@pytest.mark.parametrize("attention", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("branches", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("parameters", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("impl", implementations(("cpp", "cuda")))
def test_promotes_as_the_reference(impl, attention, branches, parameters):
    require(impl)
    if impl == "cuda" and branches == torch.float64:
        pytest.skip("the result is float64, for which CUDA C++ has no kernels")
    dtypes = [attention] * 3 + [parameters] + [branches] * 2 + [parameters] * 3
    inputs = (t.detach().to(device_of(impl)) for t in _inputs(torch.float64))
    tensors = [t.to(d).requires_grad_() for t, d in zip(inputs, dtypes, strict=True)]
    with mirage_kernels.use(impl):
        out = public(*tensors)
    peer = plain(*tensors)
    truth = plain(*(t.detach().double() for t in tensors))
    assert out.dtype == peer.dtype
    assert relative_error(out, truth) <= max(1.05 * relative_error(peer, truth), torch.finfo(out.dtype).eps)
    for tensor, grad in zip(tensors, torch.autograd.grad(out.double().square().sum(), tensors), strict=True):
        assert grad.dtype == tensor.dtype and grad.shape == tensor.shape


def test_autocast_with_branches_of_the_autocast_dtype():
    """As in a network under autocast: 16-bit maps, float32 parameters."""
    tensors = _inputs(torch.float32)
    maps = [t if i in (3, 6, 7, 8) else t.detach().bfloat16().requires_grad_() for i, t in enumerate(tensors)]
    with torch.autocast("cpu", torch.bfloat16):
        with mirage_kernels.use("cpp"):
            out = public(*maps)
        peer = plain(*maps)
    truth = plain(*(t.detach().double() for t in maps))
    assert out.dtype == peer.dtype == torch.float32
    assert relative_error(out, truth) <= relative_error(peer, truth)


@pytest.mark.parametrize("impl", implementations(("cpp", "cuda")))
def test_equals_its_parts(impl):
    require(impl)
    tensors = [t.detach().to(device_of(impl)) for t in _inputs(torch.float32, (1, 12, 20, 30, 2))]
    q, k, v, temperature, *rest = tensors
    with mirage_kernels.use(impl):
        parts = mirage_kernels.tri_branch_fusion(mirage_kernels.channel_attention(q, k, v, temperature, 2), *rest)
        assert torch.equal(public(*tensors), parts)


def test_keeps_only_its_arguments_and_small_matrices():
    tensors = _inputs(torch.float32)
    kept = {}
    with mirage_kernels.use("cpp"), torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t
    ):
        public(*tensors)
    arguments = {t.data_ptr() for t in tensors}
    extra = sum(t.numel() for p, t in kept.items() if p not in arguments)
    assert extra == 2 * 2 * (4 * 4 * 2 + 2 * 4)  # batch, heads: two matrices of 4 x 4, two norms of 4

def test_errors_name_the_argument():
    q, temperature, one = torch.zeros(1, 6, 2, 2), torch.ones(2, 1, 1), torch.ones(1)
    with pytest.raises(ValueError, match=r"mlp: expected shape \[1, 6, 2, 2\] \(like q\), got \[1, 6, 2, 3\]"):
        channel_attention_fusion(q, q, q, temperature, 2, q, torch.zeros(1, 6, 2, 3), one, one, one)
    with pytest.raises(ValueError, match=r"l_att: expected shape \[1\] or \[\], got \[1, 1\]"):
        channel_attention_fusion(q, q, q, temperature, 2, q, q, torch.ones(1, 1), one, one)
    with pytest.raises(TypeError, match="k: expected torch.float32 like q, got torch.float16"):
        channel_attention_fusion(q, q.half(), q, temperature, 2, q, q, one, one, one)
