"""A network with the attribute names of the released code and classes of its own, written for the tests of mirage.fast.

Its classes share nothing with mirage.blocks, and its modules have every attribute that those of the released code have,
also flags and numbers that nothing here reads (test_fast_released.py compares the two). Its forward returns (restored,
weighted contrastive loss).
"""

import torch
import torch.nn.functional as F
from torch import nn


class NormBody(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(dim) + 0.5)
        self.bias = nn.Parameter(torch.rand(dim) - 0.5)
        self.normalized_shape = (dim,)

    def forward(self, tokens):
        centred = tokens - tokens.mean(dim=2, keepdim=True)
        return centred * (tokens.var(dim=2, correction=0, keepdim=True) + 1e-5).rsqrt() * self.weight + self.bias


class Norm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.body = NormBody(dim)

    def forward(self, x):
        b, c, h, w = x.shape
        return self.body(x.view(b, c, h * w).permute(0, 2, 1)).permute(0, 2, 1).reshape(b, c, h, w)


class DropPath(nn.Module):
    """That of timm, whose name and attributes stand for what it computes."""

    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob
        self.scale_by_keep = True

    def forward(self, x):
        if not self.training:
            return x
        keep = 1 - self.drop_prob
        return x * torch.empty(x.shape[0], 1, 1, 1, dtype=x.dtype).bernoulli_(keep) / keep


class Gated(nn.Module):
    """`dynamic_conv`: the depthwise kernels are generated from each sample; otherwise there is one, `cconv`."""

    def __init__(self, dim, dynamic_conv=True):
        super().__init__()
        hidden = int(dim * 8 / 3)
        self.norm = nn.BatchNorm2d(dim)
        self.gic1 = nn.Conv2d(dim, hidden * 2, 1, bias=False)
        self.act = nn.GELU()
        self.split_indices = (hidden, hidden - dim, dim)
        self.dynamic_conv = dynamic_conv
        self.conv_channels = dim
        self.kernel_size = 7
        if dynamic_conv:
            self.kernel_generator = nn.Sequential(
                nn.AdaptiveAvgPool2d(1),
                nn.Conv2d(dim, dim, 1, bias=False),
                nn.GELU(),
                nn.Conv2d(dim, dim * 49, 1, bias=False),
            )
        else:
            self.cconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim, bias=False)
        self.gic2 = nn.Conv2d(hidden, dim, 1, bias=False)
        self.drop_path = DropPath(0.1)
        self.proj_out = nn.Conv2d(dim, dim, 1, bias=False)
        self.temperature = nn.Parameter(torch.full((1,), 1.3))

    def forward(self, x):
        g, i, c = self.gic1(self.norm(x)).split(self.split_indices, dim=1)
        c = self.convolve(c) if self.dynamic_conv else self.cconv(c)
        y = self.gic2(self.act(g / self.temperature) * torch.cat([i, c], 1))
        return self.proj_out(x + self.drop_path(y))

    def convolve(self, c):
        b, n, h, w = c.shape
        kernels = self.kernel_generator(c).view(b * n, 1, 7, 7)
        return F.conv2d(c.reshape(1, b * n, h, w), kernels, padding=3, groups=b * n).view(b, n, h, w)


class Mixer(nn.Module):
    def __init__(self, dim, heads, dynamic_conv=True):
        super().__init__()
        third = dim // 3
        self.num_heads = heads
        self.dim_attn = self.dim_gated = self.dim_mlp = third
        self.temperature = nn.Parameter(torch.rand(heads, 1, 1) + 0.5)
        self.qkv = nn.Conv2d(third, third * 3, 1, bias=False)
        self.qkv_dwconv = nn.Conv2d(third * 3, third * 3, 3, 1, 1, groups=third * 3, bias=False)
        self.gatedcnn = Gated(third, dynamic_conv)
        self.mlp = nn.Sequential(
            nn.Conv1d(third, third * 2, 1, bias=False), nn.GELU(), nn.Conv1d(third * 2, third, 1, bias=False)
        )
        self.project_out = nn.Conv2d(dim, dim, 1, bias=False)
        self.alpha_att = nn.Parameter(torch.full((1,), 0.9))
        self.alpha_gated = nn.Parameter(torch.full((1,), 1.1))
        self.alpha_mlp = nn.Parameter(torch.full((1,), 1.2))

    def forward(self, x):
        b, n, h, w = x.shape
        xa, xg, xm = x.split(n // 3, dim=1)
        q, k, v = (t.view(b, self.num_heads, -1, h * w) for t in self.qkv_dwconv(self.qkv(xa)).split(n // 3, 1))
        weights = torch.softmax(F.normalize(q, dim=3) @ F.normalize(k, dim=3).mT * self.temperature, dim=3)
        a = (weights @ v).view(b, n // 3, h, w)
        g = self.gatedcnn(xg)
        m = self.mlp(xm.reshape(b, n // 3, h * w)).view(b, n // 3, h, w)
        a2 = a + self.alpha_att * torch.sigmoid(g + m)
        g2 = g + self.alpha_gated * torch.sigmoid(a + m)
        m2 = m + self.alpha_mlp * torch.sigmoid(a + g)
        return self.project_out(torch.cat([a2, g2, m2], 1))


class FFN(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.project_in = nn.Conv2d(dim, dim * 4, 1, bias=False)
        self.dwconv = nn.Conv2d(dim * 4, dim * 4, 3, 1, 1, groups=dim * 4, bias=False)
        self.act = nn.GELU()
        self.project_out = nn.Conv2d(dim * 2, dim, 1, bias=False)

    def forward(self, x):
        gate, value = self.dwconv(self.act(self.project_in(x))).chunk(2, dim=1)
        return self.project_out(F.gelu(gate) * value)


class Block(nn.Module):
    def __init__(self, dim, heads, dynamic_conv=True):
        super().__init__()
        self.norm1, self.attn = Norm(dim), Mixer(dim, heads, dynamic_conv)
        self.norm2, self.ffn = Norm(dim), FFN(dim)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class Halve(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(dim, dim // 2, 3, padding=1, bias=False), nn.PixelUnshuffle(2))

    def forward(self, x):
        return self.body(x)


class ReleasedStyleMIRAGE(nn.Module):
    def __init__(self, dim=24):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 3, padding=1, bias=False)
        self.encoder = nn.Sequential(Block(dim, 1), Block(dim, 2))
        self.down = Halve(dim)
        self.latent = nn.Sequential(Block(2 * dim, 2))
        self.up = nn.Sequential(nn.Conv2d(2 * dim, 4 * dim, 3, padding=1, bias=False), nn.PixelShuffle(2))
        self.output = nn.Conv2d(dim, 3, 3, padding=1, bias=False)
        self.reduce_shallow = nn.Conv2d(dim, 12, 1)
        self.reduce_latent = nn.Conv2d(2 * dim, 12, 1)

    def covariance(self, x):
        x = x.flatten(2)
        x = x - x.mean(2, keepdim=True)
        return (x @ x.mT / (x.shape[2] - 1)).flatten(1)

    def forward(self, image):
        shallow = self.encoder(self.patch_embed(image))
        latent = self.latent(self.down(shallow))
        restored = self.output(self.up(latent) + shallow) + image
        z_s = F.normalize(self.covariance(self.reduce_shallow(shallow)), dim=1)
        z_l = F.normalize(self.covariance(self.reduce_latent(latent)), dim=1)
        return restored, 0.01 * F.cross_entropy(z_s @ z_l.T / 0.1, torch.arange(image.shape[0]))


class Stem(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, 3, padding=1, bias=False)

    def forward(self, x):
        return self.proj(x)


class Double(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(dim, dim * 2, 3, padding=1, bias=False), nn.PixelShuffle(2))

    def forward(self, x):
        return self.body(x)


class WholeNetwork(nn.Module):
    """The released code's network whole, with its names: four levels, a decoder, refinement and the SPD head.

    `head`: channels that its two reductions take, fixed for the released sizes whatever `dim` is. It only runs in
    training here.
    """

    def __init__(self, dim, num_blocks, num_refinement_blocks, heads, head=(24, 96), dynamic_conv=True):
        super().__init__()

        def level(channels, number, count):
            return nn.Sequential(*(Block(channels, number, dynamic_conv) for _ in range(count)))

        self.patch_embed = Stem(dim)
        self.encoder_level1 = level(dim, heads[0], num_blocks[0])
        self.down1_2 = Halve(dim)
        self.encoder_level2 = level(dim * 2, heads[1], num_blocks[1])
        self.down2_3 = Halve(dim * 2)
        self.encoder_level3 = level(dim * 4, heads[2], num_blocks[2])
        self.down3_4 = Halve(dim * 4)
        self.latent = level(dim * 8, heads[3], num_blocks[3])
        self.up4_3 = Double(dim * 4)
        self.reduce_chan_level3 = nn.Conv2d(dim * 6, dim * 4, 1, bias=False)
        self.reduce_dim_level3 = nn.Conv2d(dim * 8, dim * 4, 1, bias=False)
        self.decoder_level3 = level(dim * 4, heads[2], num_blocks[2])
        self.up3_2 = Double(dim * 4)
        self.reduce_chan_level2 = nn.Conv2d(dim * 4, dim * 2, 1, bias=False)
        self.decoder_level2 = level(dim * 2, heads[1], num_blocks[1])
        self.up2_1 = Double(dim * 2)
        self.decoder_level1 = level(dim * 2, heads[0], num_blocks[0])
        self.refinement = level(dim * 2, heads[0], num_refinement_blocks)
        self.output = nn.Conv2d(dim * 2, 3, 3, padding=1, bias=False)
        self.reduce_shallow = nn.Conv2d(head[0], 12, 1)
        self.reduce_latent = nn.Conv2d(head[1], 24, 1)
        self.spd_proj_shallow = nn.Linear(144, 64)
        self.spd_proj_latent = nn.Linear(576, 64)

    def embedding(self, x, project):
        x = x.flatten(2)
        x = x - x.mean(2, keepdim=True)
        covariance = x @ x.mT / (x.shape[2] - 1) + 1e-5 * torch.eye(x.shape[1], dtype=x.dtype)
        return F.normalize(project(covariance.flatten(1)), dim=1)

    def forward(self, image):
        one = self.encoder_level1(self.patch_embed(image))
        two = self.encoder_level2(self.down1_2(one))
        three = self.encoder_level3(self.down2_3(two))
        latent = self.reduce_dim_level3(self.latent(self.down3_4(three)))
        x = self.decoder_level3(self.reduce_chan_level3(torch.cat([self.up4_3(latent), three], 1)))
        x = self.decoder_level2(self.reduce_chan_level2(torch.cat([self.up3_2(x), two], 1)))
        x = self.refinement(self.decoder_level1(torch.cat([self.up2_1(x), one], 1)))
        restored = self.output(x) + image
        if not self.training:
            return restored, 0.0
        z_s = self.embedding(self.reduce_shallow(one), self.spd_proj_shallow)
        z_l = self.embedding(self.reduce_latent(latent), self.spd_proj_latent)
        return restored, 0.01 * F.cross_entropy(z_s @ z_l.T / 0.1, torch.arange(image.shape[0]))
