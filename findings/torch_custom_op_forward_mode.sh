#!/usr/bin/env bash
# torch 2.13.0: an operator registered with torch.library.custom_op and register_autograd has no forward-mode
# derivative, and says nothing: torch.func.jvp and jacfwd give zeros, and what is added beside the operator keeps its
# own tangent, so that a network with one such operator in it gets plausible, wrong directional derivatives. Reverse
# mode through the same operator is right. (Operators of ATen without the formula raise.)
# Matters here: the operators are such ones, and take the plain expressions where a tangent comes in.
#
# Seen: jvp of op [0, 0], of op(x) + x [1, 1] (right: [3, 3] and [4, 4]), jacfwd 0; reverse mode 3.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 torch==2.13.0
"$folder/venv/bin/python" - <<'PYTHON'
import torch


@torch.library.custom_op("finding::triple", mutates_args=())
def triple(x: torch.Tensor) -> torch.Tensor:
    return x * 3


triple.register_autograd(lambda ctx, grad: grad * 3)
x, direction = torch.tensor([1.0, 2.0]), torch.ones(2)
alone = torch.func.jvp(triple, (x,), (direction,))[1].tolist()
beside = torch.func.jvp(lambda v: triple(v) + v, (x,), (direction,))[1].tolist()
jacobian = torch.func.jacfwd(lambda v: triple(v).sum())(x).tolist()
leaf = x.clone().requires_grad_()
(reverse,) = torch.autograd.grad(triple(leaf).sum(), leaf)
print(torch.__version__, "jvp", alone, "beside", beside, "jacfwd", jacobian, "reverse", reverse.tolist())
dropped = alone == [0.0, 0.0] and beside == [1.0, 1.0] and jacobian == [0.0, 0.0]
assert dropped, "changed: forward mode is no longer dropped"
assert reverse.tolist() == [3.0, 3.0]
PYTHON
