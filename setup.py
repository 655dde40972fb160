"""Builds mirage_kernels._native where there is a C++ compiler, and _cuda where there are also nvcc and a GPU.

The rest is in pyproject.toml, and how it is built in _build.

Environment: MIRAGE_SKIP_NATIVE=1 installs pure Python. MIRAGE_CUDA=auto builds the CUDA library where nvcc and a GPU
are, for that GPU; on for sm_80, sm_90a and PTX, and fails where it cannot; off leaves it out. MIRAGE_CUDA_EMULATED=1
builds its kernels for the host too, for tests. CXX, CUDACXX, CMAKE_ARGS and CMAKE_BUILD_PARALLEL_LEVEL are CMake's own.
"""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent / "_build"))
from cmake_build import CMakeBuild, extensions  # noqa: E402

setup(ext_modules=extensions(), cmdclass={"build_ext": CMakeBuild})
