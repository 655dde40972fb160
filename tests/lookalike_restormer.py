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


class FourierAttention(nn.Module):
    """As an expert of MoCE-IR has it: circular convolution in squares of pixels, in float32."""

    def __init__(self, dim, patch_size):
        super().__init__()
        self.patch_size = patch_size
        self.q = nn.Conv2d(dim, dim, 1, bias=False)
        self.q_dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.kv = nn.Conv2d(dim, 2 * dim, 1, bias=False)
        self.kv_dwconv = nn.Conv2d(2 * dim, 2 * dim, 7, padding=3, groups=2 * dim)
        self.norm, self.proj_out = Norm(dim), nn.Conv2d(dim, dim, 1)

    def forward(self, x):
        size, (height, width) = self.patch_size, x.shape[2:]
        q, (k, v) = self.q_dwconv(self.q(x)), self.kv_dwconv(self.kv(x)).chunk(2, 1)
        q, k = (F.pad(t, (0, -width % size, 0, -height % size)).float() for t in (q, k))
        down, across = q.shape[2] // size, q.shape[3] // size
        q, k = (t.view(*t.shape[:2], down, size, across, size).transpose(3, 4) for t in (q, k))
        mixed = torch.fft.irfft2(torch.fft.rfft2(q) * torch.fft.rfft2(k), s=(size, size))
        mixed = mixed.transpose(3, 4).reshape(*x.shape[:2], down * size, across * size)[..., :height, :width]
        return self.proj_out(self.norm(mixed) * v)


class Expert(nn.Module):
    def __init__(self, dim, rank, patch_size):
        super().__init__()
        self.proj = nn.ModuleList(nn.Conv2d(*sizes, 1, bias=False) for sizes in ((dim, rank), (dim, rank), (rank, dim)))
        self.body = FourierAttention(rank, patch_size)

    def forward(self, x, shared):
        return self.proj[2](self.body(self.proj[0](x)) * F.silu(self.proj[1](shared))) + x


class Sequence(nn.Sequential):
    """Of modules that take two maps."""

    def forward(self, x, shared):
        for expert in self:
            x = expert(x, shared)
        return x


class Routing(nn.Module):
    def __init__(self, freq_dim, count, top_k):
        super().__init__()
        self.freq_gate, self.k = nn.Linear(freq_dim, count, bias=False), top_k

    def forward(self, x, freq_emb):
        logits = self.freq_gate(freq_emb)
        values, chosen = torch.topk((logits + 0.1 * torch.randn_like(logits)).softmax(-1), self.k)
        loss = values.square().mean() if self.training else 0
        self.chosen = chosen[0].tolist()
        return torch.zeros_like(logits).scatter(1, chosen, values), chosen, values, loss


class Adapter(nn.Module):
    """Experts by a draw, and a loss that it leaves behind. In training mode all of them, times their gates."""

    def __init__(self, dim, freq_dim=6, count=3, top_k=1):
        super().__init__()
        self.num_experts, self.top_k, self.loss = count, top_k, None
        self.routing = Routing(freq_dim, count, top_k)
        self.experts = nn.ModuleList(Sequence(Expert(dim, 2 * i + 2, 2 ** (i + 2))) for i in range(count))
        self.proj_out = nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, x, freq_emb, shared):
        gates, chosen, _, self.loss = self.routing(x, freq_emb)
        if self.training:
            mixed = sum(gates[:, i, None, None, None] * expert(x, shared) for i, expert in enumerate(self.experts))
        else:
            maps = torch.stack([self.experts[i](x, shared) for i in chosen[0]], dim=1)
            mixed = (gates.gather(1, chosen)[:, :, None, None, None] * maps).sum(1)
        return self.proj_out(mixed)


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


class Refine(nn.Module):
    """A gate from each map's means for the other, and a projection of their sum."""

    def __init__(self, dim):
        super().__init__()
        self.gate, self.proj = nn.Linear(dim, dim), nn.Conv2d(dim, dim, 1)

    def forward(self, low, high):
        gate = self.gate(low.mean((2, 3))).sigmoid()[:, :, None, None]
        return self.proj(low * high.mean(1, keepdim=True).sigmoid() + high * gate)


class FrequencyModule(nn.Module):
    """As of AdaIR: a rectangle of frequencies, as large as each image asks for, and the rest."""

    def __init__(self, dim, image_channels=3):
        super().__init__()
        self.conv1 = nn.Conv2d(image_channels, dim, 3, padding=1, bias=False)
        self.rate_conv = nn.Sequential(nn.Conv2d(dim, 3, 1), nn.GELU(), nn.Conv2d(3, 2, 1))
        self.channel_cross_l, self.channel_cross_h, self.channel_cross_agg = (CrossAttention(dim) for _ in range(3))
        self.frequency_refine = Refine(dim)
        self.para1 = nn.Parameter(torch.zeros(dim, 1, 1))
        self.para2 = nn.Parameter(torch.ones(dim, 1, 1))

    def forward(self, x, y):
        high, low = self.fft(F.interpolate(x, y.shape[2:], mode="bilinear"))
        mixed = self.frequency_refine(self.channel_cross_h(low, y), self.channel_cross_l(high, y))
        return self.channel_cross_agg(y, mixed) * self.para1 + y * self.para2

    def fft(self, x, n=128):
        x = self.conv1(x)
        shares = self.rate_conv(x.mean((2, 3), keepdim=True)).sigmoid()
        chosen = torch.zeros_like(x, dtype=torch.bool)
        height, width = x.shape[2:]
        for sample, (down, across) in enumerate(shares.flatten(1)):
            rows, columns = int(height // n * down), int(width // n * across)
            middle = (slice(size // 2 - n, size // 2 + n) for size, n in ((height, rows), (width, columns)))
            chosen[(sample, slice(None), *middle)] = True
        spectrum = torch.fft.fftshift(torch.fft.fft2(x), dim=(2, 3))
        parts = (torch.fft.ifft2(torch.fft.ifftshift(spectrum * mask, dim=(2, 3))) for mask in (~chosen, chosen))
        return tuple(part.abs() for part in parts)
