"""Triton's kernels are interpreted where there is no GPU, as in the tests of the package."""

import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when mirage_kernels is imported

if str(ROOT := Path(__file__).resolve().parents[2]) not in sys.path:
    sys.path.append(str(ROOT))  # for lab.* and tools.*; an installed mirage goes before the one here
