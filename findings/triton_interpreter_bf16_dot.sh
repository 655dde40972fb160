#!/usr/bin/env bash
# triton 3.9.0, TRITON_INTERPRET=1: tl.dot of bfloat16 operands returns numbers of another order of magnitude (about
# 1e10 for 16 x 16 matrices of standard normal values), without a warning; float16 and float32 operands are exact.
# Matters here: kernels are tested in the interpreter, where one in bfloat16 fails that is right on a GPU.
#
# Seen: largest error 0.0 in float16, 0.0 in float32, above 1e6 in bfloat16, where results are below 20.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 torch==2.13.0 triton==3.9.0
cat > "$folder/dot.py" <<'PYTHON'
import torch
import triton
import triton.language as tl


@triton.jit
def multiply(p_a, p_b, p_c, N: tl.constexpr):
    offsets = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(p_c + offsets, tl.dot(tl.load(p_a + offsets), tl.load(p_b + offsets), input_precision="ieee"))


errors = {}
for dtype in (torch.float16, torch.float32, torch.bfloat16):
    torch.manual_seed(0)
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 16).to(dtype), torch.empty(16, 16)
    multiply[(1,)](a, b, c, 16)
    errors[dtype] = (c - a.float() @ b.float()).abs().max().item()
print(triton.__version__, errors)
assert errors[torch.float16] < 1e-5 and errors[torch.float32] < 1e-5
assert errors[torch.bfloat16] > 1e6, "changed: bfloat16 products are right now"
PYTHON
TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/dot.py"
