#!/usr/bin/env bash
# PyTorch's float32 norm on the CPU loses digits as the vector gets longer.
#
# Version:   torch 2.13.0, numpy 2.3.5; CPU, float32.
# Behaviour: torch.linalg.vector_norm, and torch.nn.functional.normalize that is built on it, lose accuracy as the
#            dimension gets longer: a relative error of 2e-4 for a constant plane of 512x512 and 2e-3 for one of
#            2048x2048; 7e-4 and 9e-3 where the dimension is strided. x.square().sum() keeps 2e-7 on the same data.
#            The errors are, to both digits, those of one running float32 sum of squares (strided) and of eight of them
#            (contiguous), with ATEN_CPU_CAPABILITY default, avx2 and avx512 alike.
# Matters:   wherever a norm runs along the pixels of an image, as in channel attention.
#
# Output seen (AMD EPYC):
#
#     torch 2.13.0+cpu numpy 2.3.5
#     512x512    vector_norm 1.8e-04  strided 7.0e-04  normalize 1.8e-04  sum of squares 1.7e-07
#     2048x2048  vector_norm 2.4e-03  strided 8.5e-03  normalize 2.5e-03  sum of squares 1.7e-07
#     as described
#
# The check below asks for the size of the errors, not for their digits.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet torch==2.13.0 numpy==2.3.5
venv/bin/python - <<'PYTHON'
import sys

import numpy as np
import torch

print("torch", torch.__version__, "numpy", np.__version__)


def off(norm: torch.Tensor, truth: float) -> float:
    """Relative error of a norm."""
    return abs(norm.double().item() - truth) / truth


as_described = True
for side, at_least in ((512, 2e-5), (2048, 2e-4)):
    plane = torch.full((side * side,), 0.7)
    truth = float(np.linalg.norm(plane.numpy().astype(np.float64)))
    contiguous = off(torch.linalg.vector_norm(plane), truth)
    strided = off(torch.linalg.vector_norm(plane[:, None].repeat(1, 8), dim=0)[0], truth)
    unit = torch.nn.functional.normalize(plane[None], dim=-1)
    normalised = abs(float(np.linalg.norm(unit.numpy().astype(np.float64))) - 1)
    squares = off(plane.square().sum().sqrt(), truth)
    print(
        f"{f'{side}x{side}':10} vector_norm {contiguous:.1e}  strided {strided:.1e}  normalize {normalised:.1e}  "
        f"sum of squares {squares:.1e}"
    )
    as_described &= min(contiguous, strided, normalised) > at_least and squares < 1e-6
print("as described" if as_described else "changed: not as described above")
sys.exit(0 if as_described else 1)
PYTHON
