#!/usr/bin/env bash
# torch 2.13.0: an operator whose schema has a list of optional tensors (`Tensor?[]`) runs, passes `torch.library`'s own
# checks and is exported by torch.export, None and all; torch.jit.trace refuses the call. With a list of tensors, and
# numbers that say which places are filled, both record it.
# Matters here: weights of a block are such a list, and feed_forward_stages takes those that are there and bits.
#
# Seen: called 3.0, exported 3.0; traced: RuntimeError "unsupported input list type: Tensor?"; the other traced 3.0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 torch==2.13.0
"$folder/venv/bin/python" - <<'PYTHON'
import torch

library = torch.library.Library("finding", "DEF")
library.define("total(Tensor x, Tensor?[] others) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
library.define("total_of(Tensor x, Tensor[] others, int present) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def total(x, others):
    return x + sum(t for t in others if t is not None)


library.impl("total", total, "CompositeExplicitAutograd")
library.impl("total_of", lambda x, others, present: total(x, others), "CompositeExplicitAutograd")
for name in ("total", "total_of"):
    torch.library.register_fake(f"finding::{name}", lambda x, *_: torch.empty_like(x), lib=library)


class Optional(torch.nn.Module):
    def forward(self, x):
        return torch.ops.finding.total(x, [None, x + x])


class Present(torch.nn.Module):
    def forward(self, x):
        return torch.ops.finding.total_of(x, [x + x], 0b10)


x = torch.ones(1)
checks = ("test_schema", "test_faketensor")
torch.library.opcheck(torch.ops.finding.total.default, (x, [None, x + x]), test_utils=checks)
exported = torch.export.export(Optional(), (x,)).module()(x).item()
try:
    torch.jit.trace(Optional(), x)
    refused = ""
except Exception as error:
    refused = f"{type(error).__name__} {str(error).splitlines()[0]}"
present = torch.jit.trace(Present(), x)(x).item()
print(torch.__version__, "called", Optional()(x).item(), "exported", exported, "traced:", refused or "it is", present)
assert exported == 3.0 and present == 3.0
assert refused, "changed: a list of optional tensors can be traced"
PYTHON
