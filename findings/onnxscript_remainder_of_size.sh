#!/usr/bin/env bash
# onnxscript 0.7.2 with torch 2.13.0: torch.onnx.export(dynamo=True) of `integers % size`, where the size is that of a
# dimension which may change, ends in "int() argument must be ... not 'SymbolicTensor'". The same program is exported
# where the dimension is fixed, and so are the same numbers as floats, or as `integers - integers // size * size`.
# Matters here: positions that wrap around an image, as frequencies and circular shifts have, are written so.
#
# Seen: any size, remainder: TypeError; any size, quotient: right; any size, floats: right; one size, remainder: right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/export.py" <<'PYTHON'
import logging
import warnings

import onnxruntime
import onnxscript
import torch

logging.disable(logging.CRITICAL)
warnings.simplefilter("ignore")


class Shifted(torch.nn.Module):
    """The image moved by three columns around its edge."""

    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap

    def forward(self, x):
        columns = torch.arange(x.shape[3]) + 3
        return x.index_select(3, self.wrap(columns, x.shape[3]))


def outcome(wrap, dynamic):
    model, x = Shifted(wrap), torch.randn(1, 3, 8, 12)
    shapes = ({3: torch.export.Dim("width", min=8, max=64)},) if dynamic else None
    try:
        program = torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=shapes, verbose=False)
    except torch.onnx.OnnxExporterError as error:
        while error.__cause__ is not None:
            error = error.__cause__
        return type(error).__name__
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    if dynamic:
        x = torch.randn(1, 3, 8, 20)
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return "right" if torch.equal(torch.from_numpy(y), x.roll(-3, 3)) else "wrong"


def remainder(i, size):
    return i % size


def quotient(i, size):
    return i - i // size * size


def floats(i, size):
    return (i.float() % size).long()


cases = {
    "any size, remainder": (remainder, True),
    "any size, quotient": (quotient, True),
    "any size, floats": (floats, True),
    "one size, remainder": (remainder, False),
}
seen = {name: outcome(*case) for name, case in cases.items()}
print(f"onnxscript {onnxscript.__version__}, torch {torch.__version__}: {seen}")
assert list(seen.values()) == ["TypeError", "right", "right", "right"], "changed"
PYTHON
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 torch==2.13.0 onnx==1.23.2 onnxruntime==1.32.0 onnxscript==0.7.2
"$folder/venv/bin/python" "$folder/export.py" 2> "$folder/errors" || { cat "$folder/errors"; exit 1; }
