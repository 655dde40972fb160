"""The build backend that pyproject.toml names: setuptools, one build at a time, from a folder that can be written.

setuptools leaves files in the folder it builds from. Two builds of one checkout would overwrite each other's, so each
waits for the one before; and a checkout that cannot be written is built from a copy in the temporary folder.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from setuptools import build_meta

ROOT = Path(__file__).resolve().parent.parent
PARTS = (
    *("pyproject.toml", "setup.py", "MANIFEST.in", "CMakeLists.txt", "Makefile", "_build", "cmake", "csrc"),
    *("mkdocs.yml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "mirage", "mirage_kernels"),
    *("tests", "benchmarks", "tools", "lab", "docs", "findings"),
)
"""What a source distribution is made of (MANIFEST.in and pyproject.toml choose among it)."""
NOT_SOURCES = shutil.ignore_patterns("__pycache__", "*.pyc", "*.so", "*.egg-info")


def writable(folder: Path) -> bool:
    """Whether files can be made there: asked by making one, as permissions say nothing of a read-only file system."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Holds a lock for the block, and says so where it has to wait; no lock where the system has no ``flock``."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print(f"mirage-kernels: waiting for another build in {file.parent}", file=sys.stderr, flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def copy_sources(to: Path) -> None:
    """The sources in the folder `to`, which may be written whatever the modes of the originals."""
    for part in PARTS:
        origin = ROOT / part
        if origin.is_dir():
            shutil.copytree(origin, to / part, ignore=NOT_SOURCES)
        elif origin.exists():
            shutil.copy(origin, to / part)
    for path in (to, *to.rglob("*")):
        path.chmod(path.stat().st_mode | stat.S_IWUSR)


@contextlib.contextmanager
def source_folder() -> Iterator[Path]:
    """Enters the folder to build in: the checkout, or where that cannot be written a copy that is gone afterwards."""
    before = Path.cwd()
    with contextlib.ExitStack() as stack:
        folder = ROOT
        if writable(ROOT):
            stack.enter_context(locked(ROOT / "build" / ".lock"))
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mirage-kernels-")))
            print(f"mirage-kernels: {ROOT} cannot be written; building in {folder}", file=sys.stderr, flush=True)
            copy_sources(folder)
        stack.callback(os.chdir, before)
        os.chdir(folder)
        yield folder


def _run(hook: Callable[..., str], directory: str, *arguments: Any, **named: Any) -> str:
    directory = str(Path(directory).resolve())
    with source_folder():
        return hook(directory, *arguments, **named)


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return []


get_requires_for_build_editable = get_requires_for_build_sdist = get_requires_for_build_wheel


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Any = None) -> str:
    return _run(build_meta.prepare_metadata_for_build_wheel, metadata_directory, config_settings)


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    metadata = metadata_directory and str(Path(metadata_directory).resolve())

    def build(*arguments: Any) -> str:
        for left in Path("build").glob("lib*"):  # setuptools would pack what an earlier build has left there
            shutil.rmtree(left)
        return build_meta.build_wheel(*arguments)

    return _run(build, wheel_directory, config_settings, metadata)


def build_sdist(sdist_directory: str, config_settings: Any = None) -> str:
    return _run(build_meta.build_sdist, sdist_directory, config_settings)


def _refuse_editable_where_unwritable() -> None:
    if not writable(ROOT):
        raise SystemExit(
            f"mirage-kernels: an editable installation puts its libraries into {ROOT}, which cannot be written; "
            "install it without --editable"
        )


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: Any = None) -> str:
    _refuse_editable_where_unwritable()
    return _run(build_meta.prepare_metadata_for_build_editable, metadata_directory, config_settings)


def build_editable(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    _refuse_editable_where_unwritable()
    metadata = metadata_directory and str(Path(metadata_directory).resolve())
    return _run(build_meta.build_editable, wheel_directory, config_settings, metadata)
