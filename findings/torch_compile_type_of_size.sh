#!/usr/bin/env bash
# torch 2.13.0: in what torch.compile records for any size, `type(x.shape[2]) is int` is true, although the size is a
# symbol. In torch.export (strict=False) it is false, so that a function may ask it to leave symbols alone; compiled, it
# goes on, and its next step, x.nbytes, stops the compilation with "Cannot call numel() on tensor with symbolic
# sizes/strides", while x.numel() itself is allowed.
# Matters here: only large maps are worth less memory, and whether one is large must not be asked while compiling.
#
# Seen: compiled: type(size) is int True, x.nbytes refused, x.numel() 96; exported: type(size) is int False.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 torch==2.13.0
"$folder/venv/bin/python" - <<'PYTHON'
import torch


def kind(x):
    return x + 1 if type(x.shape[2]) is int else x


def count(x):
    return x + x.numel()


def size(x):
    return x + x.nbytes


def run(function):
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="eager", dynamic=True, fullgraph=True)
    return compiled(torch.zeros(1, 2, 8, 6))[0, 0, 0, 0].item()


is_int, numel = run(kind) == 1, run(count)
try:
    nbytes = run(size)
except Exception as error:
    assert "Cannot call numel() on tensor with symbolic sizes" in str(error)
    nbytes = "refused"


class Kind(torch.nn.Module):
    def forward(self, x):
        return kind(x)


x, sizes = torch.zeros(1, 2, 8, 6), {"x": {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}}
exported = torch.export.export(Kind(), (x,), dynamic_shapes=sizes, strict=False).module()(x)[0, 0, 0, 0].item() == 1
print(torch.__version__, "compiled: int", is_int, "nbytes", nbytes, "numel", numel, "exported: int", exported)
assert numel == 96 and not exported
assert is_int and isinstance(nbytes, str), "changed: sizes of compiled functions"
PYTHON
