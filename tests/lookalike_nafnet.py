"""NAFNet's block as others write it: by the published names, of other classes."""

import torch
from torch import nn


class LayerNorm2d(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.eps = 1e-6

    def forward(self, x):
        normal = (x - x.mean(1, True)) / (x.var(1, keepdim=True, unbiased=False) + self.eps).sqrt()
        return self.weight[:, None, None] * normal + self.bias[:, None, None]


class SimpleGate(nn.Module):
    def forward(self, x):
        first, second = x.chunk(2, dim=1)
        return first * second


class Block(nn.Module):
    """The block, with `wide` channels of the depthwise convolution and three times its own of the second gate."""

    def __init__(self, channels, wide):
        super().__init__()
        half, hidden = wide // 2, 3 * channels
        self.conv1, self.conv2 = nn.Conv2d(channels, wide, 1), nn.Conv2d(wide, wide, 3, padding=1, groups=wide)
        self.sca = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(half, half, 1))
        self.sg, self.conv3 = SimpleGate(), nn.Conv2d(half, channels, 1)
        self.conv4, self.conv5 = nn.Conv2d(channels, 2 * hidden, 1), nn.Conv2d(hidden, channels, 1)
        self.norm1, self.norm2 = LayerNorm2d(channels), LayerNorm2d(channels)
        self.dropout1, self.dropout2 = nn.Identity(), nn.Dropout(0.1)
        self.beta = nn.Parameter(torch.full((1, channels, 1, 1), 0.5))
        self.gamma = nn.Parameter(torch.full((1, channels, 1, 1), -0.3))

    def forward(self, inp):
        x = self.sg(self.conv2(self.conv1(self.norm1(inp))))
        y = inp + self.dropout1(self.conv3(x * self.sca(x))) * self.beta
        return y + self.dropout2(self.conv5(self.sg(self.conv4(self.norm2(y))))) * self.gamma
