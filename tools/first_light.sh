#!/usr/bin/env bash
# The kernels on a GPU, in ten minutes: right or wrong first, then how fast. See tools/first_light/__init__.py.
#
#     tools/first_light.sh                      results in $OUT, or in out/first-light
#     tools/first_light.sh --library _cuda.so   with a CUDA library that was built elsewhere, for this Python
#     tools/first_light.sh --dry-run            every step without a GPU, on tiny shapes
#
# PYTHON names the interpreter, which has PyTorch, Triton and what builds the package. Nothing is downloaded.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" -m tools.first_light "$@"
