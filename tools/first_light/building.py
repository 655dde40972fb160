"""The package with its CUDA library, for one GPU, in a folder of its own: built in the background, or taken."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from tools.first_light.pool import Row

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("mirage", "mirage_kernels")
LIBRARIES = ("_cuda", "_cuda_emulated")
END_OF_LOG = 1500
ENDING = 2.0
"""Seconds in which ninja ends what it has started."""


def architecture_of(capability: str) -> str:
    """What CMake calls the GPUs of a compute capability, as cmake/cuda.cmake chooses: ``"9.0"`` is ``"90a-real"``."""
    number = capability.replace(".", "")
    return "90a-real" if number == "90" else f"{number}-real"


class Build(threading.Thread):
    """``pip install`` of this checkout, without dependencies and network; where that fails, CMake by itself for the
    CUDA library alone.

    Args:
        site: folder that the package goes to.
        scratch: folder for CMake's files.
        log: file that the output goes to.
        capability: of the GPU; None where there is none: the Python sources alone.
        seconds: after which it is stopped.
    """

    def __init__(self, site: Path, scratch: Path, log: Path, capability: str | None, seconds: float) -> None:
        super().__init__(name="build", daemon=True)
        self._site, self._scratch, self._log, self._capability = site, scratch, log, capability
        self._start, self._seconds = time.monotonic(), seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._row: Row = {}

    def run(self) -> None:
        try:
            with self._log.open("wb") as output:
                if self._execute(self._by_pip(), output):
                    self._row = {"how": "pip"}
                elif self._capability is not None and self._execute(self._by_cmake(self._capability), output):
                    (library,) = self._scratch.glob("_cuda*.so")
                    self._row = {**place(library, self._site), "how": f"cmake, as pip failed; see {self._log.name}"}
                else:
                    self._row = {"status": "failed", "problem": self._said()}
        except subprocess.TimeoutExpired:
            self.stop()
            self._row = {"status": "timed out", "problem": f"not built after {self._seconds:.0f} s: {self._said()}"}
        except Exception as error:  # without the library there is still the other half of the run
            self._row = {"status": "failed", "problem": f"{type(error).__name__}: {error}"}

    def outcome(self) -> Row:
        """What came of it, once it has ended."""
        self.join()
        found = {"status": "ok", "libraries": libraries(self._site), **self._row}
        return {**found, "seconds": round(time.monotonic() - self._start, 1)}

    def stop(self) -> None:
        """End what runs. Compilers have process groups of their own, which ninja ends where it is asked to end."""
        if self._process is not None and self._process.poll() is None:
            for asked in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(OSError):
                    os.killpg(self._process.pid, asked)
                time.sleep(ENDING if asked == signal.SIGTERM else 0.0)
            self._process.wait()

    def _by_pip(self) -> list[list[str]]:
        install = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-build-isolation"]
        return [[*install, "--no-deps", "--no-index", "--verbose", "--target", str(self._site), str(ROOT)]]

    def _by_cmake(self, capability: str) -> list[list[str]]:
        import pybind11

        configure = ["cmake", "-S", str(ROOT), "-B", str(self._scratch), "-G", "Ninja", "-DMIRAGE_CUDA=ON"]
        configure += [f"-DMIRAGE_CUDA_ARCHITECTURES={architecture_of(capability)}"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
        return [configure, ["cmake", "--build", str(self._scratch), "--target", "_cuda"]]

    def _execute(self, commands: Iterable[list[str]], output: object) -> bool:
        """Whether all of them succeed, one after the other."""
        settings = {"MIRAGE_SKIP_NATIVE": "1", "MIRAGE_CUDA": "off"}
        if self._capability is not None:
            architecture = architecture_of(self._capability)
            settings = {"MIRAGE_CUDA": "on", "CMAKE_ARGS": f"-DMIRAGE_CUDA_ARCHITECTURES={architecture}"}
        for command in commands:
            self._process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **settings},
                start_new_session=True,
            )
            if self._process.wait(max(0.0, self._start + self._seconds - time.monotonic())):
                return False
        return True

    def _said(self) -> str:
        return self._log.read_text(errors="replace").strip()[-END_OF_LOG:]


def libraries(site: Path) -> dict[str, int]:
    """Bytes of the compiled libraries of a folder with the packages."""
    return {path.name: path.stat().st_size for path in sorted((site / "mirage_kernels").glob("_*.so"))}


def place(library: Path, site: Path) -> Row:
    """Put a CUDA library beside the Python sources, which are copied to `site` where they are not there.

    Raises:
        FileNotFoundError, ValueError: `library` is no file, or none of this Python.
    """
    if not library.is_file():
        raise FileNotFoundError(f"library: expected a file, got {library}")
    names = [f"{name}{suffix}" for name in LIBRARIES for suffix in EXTENSION_SUFFIXES]
    if library.name not in names:
        raise ValueError(f"library: expected {names[0]}, as this Python imports it, got {library.name}")
    for package in PACKAGES:
        if not (site / package).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.pyc", "_cuda*.so")
            shutil.copytree(ROOT / package, site / package, ignore=ignored)
    shutil.copy(library, site / "mirage_kernels" / library.name)
    return {"status": "ok", "libraries": libraries(site)}


def emulated() -> Path | None:
    """The library that runs the CUDA kernels on the host, where this checkout has one."""
    found = [ROOT / "mirage_kernels" / f"_cuda_emulated{suffix}" for suffix in EXTENSION_SUFFIXES]
    return next((path for path in found if path.is_file()), None)
