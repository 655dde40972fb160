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
