#!/usr/bin/env bash
# torch 2.13.0: FlopCounterMode counts the weight gradient of a grouped convolution `groups` times over. Forward is
# right, and so is everything with groups=1. Depthwise convolutions make a network's step look far dearer than it is: of
# a network of 1x1 and depthwise 3x3 convolutions most of the counted FLOPs of a step can be ones that nobody computes.
# Matters here: depthwise convolutions are part of every block; only forward passes are compared with the paper's FLOPs.
#
# Seen, 4 channels of 8x8 pixels, 3x3 kernel, padding 1: groups=4 forward 4608, backward 23040 (9216 is right: twice
# forward); groups=1 forward 18432, backward 36864.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 torch==2.13.0
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode


def count(groups):
    x = torch.randn(1, 4, 8, 8, requires_grad=True)
    weight = torch.randn(4, 4 // groups, 3, 3, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        y = F.conv2d(x, weight, padding=1, groups=groups).sum()
    with FlopCounterMode(display=False) as backward:
        y.backward()
    return forward.get_total_flops(), backward.get_total_flops()


dense, depthwise = count(1), count(4)
print(torch.__version__, "dense", dense, "depthwise", depthwise)
assert dense == (18432, 36864) and depthwise[0] == 4608
assert depthwise[1] == 23040, "changed: the weight gradient is no longer counted once for each group"
PYTHON
