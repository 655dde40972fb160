"""Blocks with the attribute names of Restormer and classes of their own, written for the tests of mirage.fast."""

import torch
import torch.nn.functional as F
from torch import nn


class Scaled(nn.Module):
    """A norm's weights, as the published code keeps them: without an eps, over the last dimension."""

    def __init__(self, dim, bias=True, centred=True):
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(dim))
        self.bias = nn.Parameter(0.1 * torch.randn(dim)) if bias else None
        self.centred = centred

    def forward(self, x):
        deviation = torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5)
        x = (x - x.mean(-1, keepdim=True) if self.centred else x) / deviation * self.weight
        return x if self.bias is None else x + self.bias


class Norm(nn.Module):
    def __init__(self, dim, bias=True, centred=True):
        super().__init__()
        self.body = Scaled(dim, bias, centred)

    def forward(self, x):
        return self.body(x.movedim(1, 3)).movedim(3, 1)


class Attention(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(1, 1, 1))
        self.qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.qkv_dwconv = nn.Conv2d(3 * dim, 3 * dim, 3, padding=1, groups=3 * dim)
        self.project_out = nn.Conv2d(dim, dim, 1)

    def forward(self, x):
        q, k, v = (t.flatten(2) for t in self.qkv_dwconv(self.qkv(x)).chunk(3, 1))
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * self.temperature[0]
        return self.project_out((scores.softmax(-1) @ v).reshape(x.shape))


class FeedForward(nn.Module):
    def __init__(self, dim, activation=F.gelu):
        super().__init__()
        hidden = int(dim * 2.66)
        self.project_in = nn.Conv2d(dim, 2 * hidden, 1, bias=False)
        self.dwconv = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden, bias=False)
        self.project_out = nn.Conv2d(hidden, dim, 1, bias=False)
        self.activation = activation

    def forward(self, x):
        first, second = self.dwconv(self.project_in(x)).chunk(2, 1)
        return self.project_out(self.activation(first) * second)


class Block(nn.Module):
    def __init__(self, dim, activation=F.gelu, bias=True, centred=True):
        super().__init__()
        self.norm1, self.norm2 = Norm(dim, bias, centred), Norm(dim, bias, centred)
        self.attn, self.ffn = Attention(dim), FeedForward(dim, activation)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class ListedBlock(nn.Module):
    """As of MoCE-IR's encoder."""

    def __init__(self, dim, bias=True, centred=True):
        super().__init__()
        self.norms = nn.ModuleList((Norm(dim, bias, centred), Norm(dim, bias, centred)))
        self.mixer, self.ffn = Attention(dim), FeedForward(dim)

    def forward(self, x):
        x = x + self.mixer(self.norms[0](x))
        return x + self.ffn(self.norms[1](x))


class CrossAttention(nn.Module):
    """As of AdaIR, and of MoCE-IR's decoder with a `size` of 7."""

    def __init__(self, dim, size=3, bias=False):
        super().__init__()
        self.temperature = nn.Parameter(torch.full((2, 1, 1), 1.5))
        self.q = nn.Conv2d(dim, dim, 1, bias=bias)
        self.q_dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=bias)
        self.kv = nn.Conv2d(dim, 2 * dim, 1, bias=bias)
        self.kv_dwconv = nn.Conv2d(2 * dim, 2 * dim, size, padding=size // 2, groups=2 * dim, bias=bias)
        self.project_out = nn.Conv2d(dim, dim, 1, bias=bias)

    def forward(self, x, y):
        q, k, v = (t.unflatten(1, (2, -1)).flatten(3) for t in (
            self.q_dwconv(self.q(x)), *self.kv_dwconv(self.kv(y)).chunk(2, 1)
        ))  # fmt: skip
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * self.temperature
        return self.project_out((scores.softmax(-1) @ v).reshape(x.shape))


class Adapter(nn.Module):
    """An expert by a draw, and a loss that it leaves behind."""

    def __init__(self, dim, freq_dim):
        super().__init__()
        self.routing = nn.ModuleDict({"freq_gate": nn.Linear(freq_dim, 2, bias=False)})
        self.experts = nn.ModuleList(nn.Conv2d(dim, dim, 1, bias=False) for _ in range(2))

    def forward(self, x, freq_emb, shared):
        gates = self.routing["freq_gate"](freq_emb)
        gates = gates + 0.1 * torch.randn_like(gates)
        self.loss = gates.square().mean() if self.training else 0
        chosen = self.experts[int(gates[0].argmax())]
        return chosen(x) * F.silu(shared) * gates.max()


class ListedDecoderBlock(nn.Module):
    """As of MoCE-IR's decoder."""

    def __init__(self, dim, freq_dim=6):
        super().__init__()
        self.norms = nn.ModuleList((Norm(dim), Norm(dim)))
        self.proj = nn.ModuleList(nn.Conv2d(dim, dim, 1) for _ in range(2))
        self.shared, self.mixer, self.ffn = Attention(dim), CrossAttention(dim, size=7), FeedForward(dim)
        self.adapter = Adapter(dim, freq_dim)

    def forward(self, x, freq_emb=None):
        shortcut, x = x, self.norms[0](x)
        shared, x = self.shared(self.proj[0](x)), self.proj[1](x)
        x = self.mixer(self.adapter(x, freq_emb, shared), shared) + shortcut
        return x + self.ffn(self.norms[1](x)), self.adapter.loss
