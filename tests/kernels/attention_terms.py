"""The terms of sums that are gradients of the attention and fusion operators: see `OperatorTests.terms`."""

import torch
import torch.nn.functional as F


def of_fusion(branches, grad_output):
    """The gradients of the three weights are sums over every pixel; their terms."""
    att, conv, mlp = (t.detach() for t in branches)
    grads = grad_output.chunk(3, 1)
    sums = {"grad_l_att": conv + mlp, "grad_l_conv": att + mlp, "grad_l_mlp": att + conv}
    return {name: grad * torch.sigmoid(s) for grad, (name, s) in zip(grads, sums.items(), strict=True)}


def of_attention(inputs, grad_att):
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
