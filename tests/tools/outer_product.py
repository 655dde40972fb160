"""Run by test_compile_triton.py in a process of its own, where Triton does not interpret: prints the rows for a kernel
that fits in registers, one that does not, and one that does not compile."""

import json
import sys
from dataclasses import asdict

import torch
import triton
import triton.language as tl

from tools import compile_triton as tool  # before Triton is imported: it turns the interpreter off


@triton.jit
def outer_product(p_x, p_y, N: tl.constexpr, BROKEN: tl.constexpr):
    o = tl.arange(0, N)
    b_x = tl.load(p_x + o)
    b = tl.load(p_x + o[:, None] * N + o[None, :])  # N * N values, all needed until the loop ends
    for _ in range(8):
        b = b * tl.sum(b, 0)[None, :] + b_x[:, None]
    tl.static_assert(not BROKEN, "asked to break")
    tl.store(p_y + o[:, None] * N + o[None, :], b)


compiler = tool.Compiler(sys.argv[1], "outer_product")
x, y = (torch.empty(256 * 256, device="meta") for _ in range(2))
for size, broken in ((16, False), (16, False), (256, False), (16, True)):
    compiler(outer_product, 7, (x, y), {"N": size, "BROKEN": broken, "num_warps": 4})
print(json.dumps([asdict(row) | {"problem": row.problem} for row in compiler.rows]))
