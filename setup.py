"""Builds mirage_kernels._native where there is a C++ compiler, and mirage_kernels._cuda where there is also nvcc.

The rest is in pyproject.toml.

Environment: MIRAGE_SKIP_NATIVE=1 installs pure Python; MIRAGE_SKIP_CUDA=1 leaves the CUDA library out;
MIRAGE_FORCE_CUDA=1 fails where it cannot be built; MIRAGE_CUDA_EMULATED=1 builds its kernels for the host too, for
tests. CXX, CUDACXX, CMAKE_ARGS and CMAKE_BUILD_PARALLEL_LEVEL are CMake's own.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent


def flag(name: str) -> bool:
    return os.environ.get(name, "0").lower() not in ("", "0", "false", "no", "off")


def compiler() -> str | None:
    """The C++ compiler CMake will find: CXX, or the first of the usual names."""
    named = os.environ.get("CXX")
    candidates = [named.split()[0]] if named else ["c++", "g++", "clang++"]
    return next((found for name in candidates if (found := shutil.which(name))), None)


class CMakeBuild(build_ext):
    """Each extension is a target of one CMake project, which is configured with the first."""

    configured = None

    def build_extension(self, ext: Extension) -> None:
        name = ext.name.rpartition(".")[2]
        try:
            if self.configured is None:
                self.configured = self.configure(Path(self.get_ext_fullpath(ext.name)).resolve().parent)
            subprocess.run(["cmake", "--build", str(self.configured), "--target", name], check=True)
        except subprocess.CalledProcessError as error:
            if ext.optional:
                raise CompileError(f"{name}: {error}") from None  # which setuptools turns into a warning
            raise SystemExit(
                f"mirage-kernels: building {name} failed ({error}). The output above says why; MIRAGE_SKIP_NATIVE=1 "
                "installs without native code, MIRAGE_SKIP_CUDA=1 without the CUDA library."
            ) from None

    def configure(self, target: Path) -> Path:
        """The build folder, after CMake has been told to put what it builds into `target`."""
        import pybind11

        # Not self.build_temp, which an editable installation throws away: wheel and tests would compile it all again.
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        cuda = "OFF" if flag("MIRAGE_SKIP_CUDA") else "ON" if flag("MIRAGE_FORCE_CUDA") else "AUTO"
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",  # each isolated build has its own
            *("-DMIRAGE_BUILD_PYTHON=ON", "-DMIRAGE_BUILD_TESTS=OFF"),
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DMIRAGE_VERSION={self.distribution.get_version()}",
            f"-DMIRAGE_CUDA={cuda}",
            f"-DMIRAGE_CUDA_EMULATED={'ON' if flag('MIRAGE_CUDA_EMULATED') else 'OFF'}",
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]
        subprocess.run(configure, check=True)
        return build


def extensions() -> list[Extension]:
    force = flag("MIRAGE_FORCE_CUDA")
    if force and (flag("MIRAGE_SKIP_CUDA") or flag("MIRAGE_SKIP_NATIVE")):
        raise SystemExit("mirage-kernels: MIRAGE_FORCE_CUDA contradicts MIRAGE_SKIP_CUDA and MIRAGE_SKIP_NATIVE")
    reason = ""
    if flag("MIRAGE_SKIP_NATIVE"):
        reason = "MIRAGE_SKIP_NATIVE is set"
    elif compiler() is None:
        reason = "no C++ compiler was found"
        if force:
            raise SystemExit(f"mirage-kernels: MIRAGE_FORCE_CUDA is set, but {reason}")
    if reason:
        print(f"mirage-kernels: {reason}: installing pure Python, without the C++ library", file=sys.stderr)
        return []
    found = [Extension("mirage_kernels._native", sources=[])]
    if force or (not flag("MIRAGE_SKIP_CUDA") and shutil.which(os.environ.get("CUDACXX", "nvcc"))):
        # without force an nvcc that does not work must not be in the way of the rest
        found.append(Extension("mirage_kernels._cuda", sources=[], optional=not force))
    if flag("MIRAGE_CUDA_EMULATED"):
        found.append(Extension("mirage_kernels._cuda_emulated", sources=[]))
    return found


setup(ext_modules=extensions(), cmdclass={"build_ext": CMakeBuild})
