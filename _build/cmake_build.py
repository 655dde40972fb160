"""What setup.py builds with CMake: the settings in the environment, and the folder that keeps what was compiled."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from backend import locked
from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent.parent
RENAMED = {"MIRAGE_SKIP_CUDA": "MIRAGE_CUDA=off", "MIRAGE_FORCE_CUDA": "MIRAGE_CUDA=on"}
LIBRARIES = ("_native", "_cuda", "_cuda_emulated")


def flag(name: str) -> bool:
    return os.environ.get(name, "0").lower() not in ("", "0", "false", "no", "off")


def cuda_setting() -> str:
    """MIRAGE_CUDA: ``"auto"``, ``"on"`` or ``"off"``."""
    for old, new in RENAMED.items():
        if os.environ.get(old):
            raise SystemExit(f"mirage-kernels: {old} is no longer read; set {new}")
    setting = os.environ.get("MIRAGE_CUDA", "").lower() or "auto"
    if setting not in ("auto", "on", "off"):
        raise SystemExit(f"mirage-kernels: MIRAGE_CUDA: expected auto, on or off, got {setting!r}")
    return setting


def compiler() -> str | None:
    """The C++ compiler CMake will find: CXX, or the first of the usual names."""
    named = os.environ.get("CXX")
    candidates = [named.split()[0]] if named else ["c++", "g++", "clang++"]
    return next((found for name in candidates if (found := shutil.which(name))), None)


def extensions() -> list[Extension]:
    """The libraries to build. Whether a GPU and nvcc are here for ``auto`` is CMake's to find out (cmake/cuda.cmake)."""
    cuda = cuda_setting()
    reason = ""
    if flag("MIRAGE_SKIP_NATIVE"):
        reason = "MIRAGE_SKIP_NATIVE is set"
    elif compiler() is None:
        reason = "no C++ compiler was found"
    if reason:
        if cuda == "on":
            raise SystemExit(f"mirage-kernels: MIRAGE_CUDA=on, but {reason}")
        print(f"mirage-kernels: {reason}: installing pure Python, without the C++ library", file=sys.stderr)
        return []
    found = [Extension("mirage_kernels._native", sources=[])]
    if cuda != "off":
        # unless asked for, an nvcc that does not work must not be in the way of the rest
        found.append(Extension("mirage_kernels._cuda", sources=[], optional=cuda == "auto"))
    if flag("MIRAGE_CUDA_EMULATED"):
        found.append(Extension("mirage_kernels._cuda_emulated", sources=[]))
    return found


def cache_entries(build: Path) -> dict[str, str]:
    """The entries of a build folder's CMake cache; none where there is no cache."""
    cache = build / "CMakeCache.txt"
    entries = {}
    for line in cache.read_text(errors="replace").splitlines() if cache.is_file() else ():
        name, separator, value = line.partition("=")
        if separator and not line.startswith(("#", "//")):
            entries[name.partition(":")[0]] = value
    return entries


def cache_problem(build: Path, source: Path, generator: str, cxx: str | None) -> str:
    """Why CMake could not go on in `build`: it belongs to another folder, generator or compiler. Empty where it can."""
    entries = cache_entries(build)
    if not entries:
        return "it has no cache" if build.is_dir() and any(build.iterdir()) else ""
    for name, expected in (("CMAKE_HOME_DIRECTORY", source), ("CMAKE_CACHEFILE_DIR", build)):
        if not entries.get(name) or Path(entries[name]).resolve() != expected.resolve():
            return f"it is of the folder {entries.get(name)}"
    if entries.get("CMAKE_GENERATOR") != generator:
        return f"it is of the generator {entries.get('CMAKE_GENERATOR')}"
    cached = shutil.which(entries.get("CMAKE_CXX_COMPILER", ""))
    if cached is None or (cxx is not None and Path(cached) != Path(cxx)):
        return f"it is of the compiler {entries.get('CMAKE_CXX_COMPILER')}"
    return ""


class CMakeBuild(build_ext):
    """Each extension is a target of one CMake project, which is configured with the first."""

    configured = None

    def run(self) -> None:
        # Not self.build_temp, which an editable installation throws away: wheel and tests would compile it all again.
        self.folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        with locked(self.folder.with_name(f".lock-{self.folder.name}")):
            super().run()
        if self.inplace:
            self.remove_stale()

    def remove_stale(self) -> None:
        """A library in the checkout that this build left out is an older one, which the package would load."""
        built = {ext.name.rpartition(".")[2] for ext in self.extensions if Path(self.get_ext_fullpath(ext.name)).exists()}
        for name in set(LIBRARIES) - built:
            stale = ROOT / "mirage_kernels" / Path(self.get_ext_filename(name)).name
            if stale.exists():
                print(f"mirage-kernels: removing {stale}, of an earlier build", file=sys.stderr)
                stale.unlink()

    def build_extension(self, ext: Extension) -> None:
        name = ext.name.rpartition(".")[2]
        try:
            if self.configured is None:
                self.configured = self.configure()
            if ext.optional and cache_entries(self.configured).get("MIRAGE_WITH_CUDA") != "ON":
                return  # CMake has said why
            subprocess.run(["cmake", "--build", str(self.configured), "--target", name], check=True)
        except subprocess.CalledProcessError as error:
            if ext.optional:
                raise CompileError(f"{name}: {error}") from None  # which setuptools turns into a warning
            raise SystemExit(
                f"mirage-kernels: building {name} failed ({error}). The output above says why; MIRAGE_SKIP_NATIVE=1 "
                "installs without native code, MIRAGE_CUDA=off without the CUDA library."
            ) from None
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(self.configured / "lib" / target.name), str(target))

    def configure(self) -> Path:
        """The build folder, configured."""
        import pybind11

        build = self.folder
        if problem := cache_problem(build, ROOT, "Ninja", compiler()):
            print(f"mirage-kernels: {build} starts afresh: {problem}", file=sys.stderr, flush=True)
            shutil.rmtree(build)
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",  # each isolated build has its own
            *("-DMIRAGE_BUILD_PYTHON=ON", "-DMIRAGE_BUILD_TESTS=OFF"),
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={build / 'lib'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DMIRAGE_VERSION={self.distribution.get_version()}",
            f"-DMIRAGE_CUDA={cuda_setting().upper()}",
            f"-DMIRAGE_CUDA_EMULATED={'ON' if flag('MIRAGE_CUDA_EMULATED') else 'OFF'}",
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]
        subprocess.run(configure, check=True)
        return build
