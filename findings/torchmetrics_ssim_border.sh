#!/usr/bin/env bash
# torchmetrics 1.9.0: structural_similarity_index_measure mirrors pictures at their border, by 5 pixels, and averages
# over those positions too. Wang et al.'s code and scikit-image leave them out, and so did torchmetrics up to 1.4.1:
# the same call gives other numbers from 1.4.2 on. Its docstring says neither. The published definition is the mean of
# return_full_image's picture without its outer 5 pixels.
# Matters here: SSIM of this package is scikit-image's. Numbers of torchmetrics cannot be set beside it, nor beside
# those of another version of itself: differences between networks in a table are of the size seen here.
#
# Seen, a wave against the same with noise:
#
#     48x48:   1.9.0 and 1.4.2 0.37680, 1.4.1 and scikit-image 0.39012
#     128x128: 1.9.0 and 1.4.2 0.38301, 1.4.1 and scikit-image 0.38704
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/ssim.py" <<'PYTHON'
import sys

import numpy as np
import torch
import torchmetrics
from skimage.metrics import structural_similarity
from torchmetrics.functional.image import structural_similarity_index_measure

border_counts = sys.argv[1] == "counts"
for side in (48, 128):
    random = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side] / 64
    wave = np.stack([0.5 + 0.4 * np.sin(9 * x + k) * np.cos(7 * y + k) for k in range(3)])
    noisy = np.clip(wave + 0.1 * random.standard_normal(wave.shape), 0, 1)
    a, b = torch.from_numpy(noisy)[None], torch.from_numpy(wave)[None]
    wang = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0)
    published = structural_similarity(noisy, wave, channel_axis=0, **wang)
    seen = structural_similarity_index_measure(a, b, data_range=1.0).item()
    full = structural_similarity_index_measure(a, b, data_range=1.0, return_full_image=True)[1]
    inner = full[..., 5:-5, 5:-5].mean().item()
    print(f"torchmetrics {torchmetrics.__version__} {side}x{side}: {seen:.5f}, scikit-image {published:.5f}")
    assert abs(inner - published) < 1e-6
    assert (abs(seen - published) > 2e-3) == border_counts, "changed: which positions count"
    assert not border_counts or abs(seen - full.mean().item()) < 1e-6
    assert border_counts or abs(seen - published) < 1e-6
PYTHON
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/pip" install --quiet numpy==2.4.6 torch==2.13.0 "$@"; }
pip scikit-image==0.26.0 torchmetrics==1.9.0
"$folder/venv/bin/python" "$folder/ssim.py" counts
pip torchmetrics==1.4.2
"$folder/venv/bin/python" "$folder/ssim.py" counts
pip torchmetrics==1.4.1
"$folder/venv/bin/python" "$folder/ssim.py" "left out"
