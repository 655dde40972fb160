"""Kernels are tested on the GPU where there is one, else Triton's interpreter runs them on the CPU."""

import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

sys.path.insert(0, str(Path(__file__).parent))  # the harness is a module beside the tests
