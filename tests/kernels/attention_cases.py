"""Arguments for the tests of the attention and fusion operators. A shape is (B, C, H, W, heads)."""

import torch
import torch.nn.functional as F

SHAPES = (
    (2, 8, 5, 7, 2),
    (1, 3, 1, 1, 3),  # one channel per head, one pixel: softmax of one element
    (1, 10, 1, 13, 2),
    (2, 8, 11, 1, 1),
    (1, 24, 16, 17, 1),
    (1, 20, 9, 9, 4),
    (1, 6, 33, 47, 1),
)
EMPTY = (0, 8, 5, 7, 2)
LARGE = (1, 8, 1024, 1024, 2)


def _normal(shape, generator):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def attention(shape, generator):
    """q, k, v and the temperature; k resembles q, so that the softmax is far from uniform."""
    batch, channels, height, width, heads = shape
    q, noise, v = (_normal((batch, channels, height, width), generator) for _ in range(3))
    return q, q + noise, v + 0.3, 1 + 4 * torch.rand(heads, 1, 1, generator=generator, dtype=torch.float64)


def branches(shape, generator):
    """Three branches and their weights."""
    maps = [_normal(shape[:4], generator) for _ in range(3)]
    return *maps, *(1 + 0.1 * _normal((1,), generator) for _ in range(3))


def attention_and_branches(shape, generator):
    _, conv, mlp, *weights = branches(shape, generator)
    return *attention(shape, generator), conv, mlp, *weights




def fusion_terms(branches, grad_output):
    """The gradients of the three weights are sums over every pixel; their terms."""
    att, conv, mlp = (t.detach() for t in branches)
    grads = grad_output.chunk(3, 1)
    sums = {"grad_l_att": conv + mlp, "grad_l_conv": att + mlp, "grad_l_mlp": att + conv}
    return {name: grad * torch.sigmoid(s) for grad, (name, s) in zip(grads, sums.items(), strict=True)}


def attention_terms(inputs, grad_att):
    """The gradient of a head's temperature is a sum over i, j and the pixels p of cos_ij attn_ij g_ip (v_jp - a_ip);
    the norms of its terms over p."""
    q, k, v, temperature = (t.detach() for t in inputs)
    heads = temperature.shape[0]
    q, k, v, grad = (t.reshape(t.shape[0], heads, -1, t.shape[2] * t.shape[3]) for t in (q, k, v, grad_att))
    cosine = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    attn = (cosine * temperature).softmax(-1)
    att = attn @ v
    # sum over p of g_ip^2 (v_jp - a_ip)^2, multiplied out
    spread = grad**2 @ (v**2).mT - 2 * (grad**2 * att) @ v.mT + (grad**2 * att**2).sum(-1, keepdim=True)
    return {"grad_temperature": cosine * attn * spread.clamp_min(0).sqrt()}
