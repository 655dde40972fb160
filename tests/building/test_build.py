"""Installation: settings, the folder that keeps what was compiled, folders that were moved or cannot be written."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "_build"))
backend = pytest.importorskip("backend", reason="setuptools is not installed")
cmake_build = pytest.importorskip("cmake_build", reason="setuptools is not installed")

BUILD_WHEEL = "import sys; sys.path.insert(0, '_build'); import backend; print(backend.build_wheel(sys.argv[1]))"
BUILD_EDITABLE = "import sys; sys.path.insert(0, '_build'); import backend; backend.build_editable(sys.argv[1])"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the sources, without anything that was built."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    backend.copy_sources(copy)
    return copy


def build(checkout: Path, code: str, output: Path, **options) -> subprocess.CompletedProcess:
    output.mkdir(exist_ok=True)
    environment = {"MIRAGE_SKIP_NATIVE": "1", **os.environ, **options.pop("env", {})}
    command = [sys.executable, "-c", code, str(output)]
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, **options)


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    for name in ("MIRAGE_CUDA", "MIRAGE_SKIP_CUDA", "MIRAGE_FORCE_CUDA", "MIRAGE_SKIP_NATIVE", "MIRAGE_CUDA_EMULATED"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("given, names", [
    ({}, ["_native", "_cuda"]),
    ({"MIRAGE_CUDA": "auto"}, ["_native", "_cuda"]),
    ({"MIRAGE_CUDA": "ON"}, ["_native", "_cuda"]),
    ({"MIRAGE_CUDA": "off"}, ["_native"]),
    ({"MIRAGE_CUDA": "off", "MIRAGE_CUDA_EMULATED": "1"}, ["_native", "_cuda_emulated"]),
    ({"MIRAGE_SKIP_NATIVE": "1"}, []),
])  # fmt: skip
def test_settings_choose_the_libraries(given, names, monkeypatch):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    extensions = cmake_build.extensions()
    assert [e.name for e in extensions] == [f"mirage_kernels.{name}" for name in names]
    # Only `auto` may go on without the CUDA library.
    assert [e.name for e in extensions if e.optional] == [
        "mirage_kernels._cuda" for _ in range("_cuda" in names and given.get("MIRAGE_CUDA", "auto") == "auto")
    ]


@pytest.mark.parametrize("given, message", [
    ({"MIRAGE_SKIP_CUDA": "1"}, "MIRAGE_SKIP_CUDA is no longer read; set MIRAGE_CUDA=off"),
    ({"MIRAGE_FORCE_CUDA": "1"}, "MIRAGE_FORCE_CUDA is no longer read; set MIRAGE_CUDA=on"),
    ({"MIRAGE_CUDA": "yes"}, "MIRAGE_CUDA: expected auto, on or off, got 'yes'"),
    ({"MIRAGE_CUDA": "on", "MIRAGE_SKIP_NATIVE": "1"}, "MIRAGE_CUDA=on, but MIRAGE_SKIP_NATIVE is set"),
    ({"MIRAGE_CUDA": "on", "CXX": "/nowhere/c++"}, "MIRAGE_CUDA=on, but no C\\+\\+ compiler was found"),
])  # fmt: skip
def test_settings_that_cannot_be_followed(given, message, monkeypatch):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=message):
        cmake_build.extensions()


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


NO_QUERY = 'case "$1" in -L) echo "GPU 0: Old (UUID: GPU-1)";; *) echo "not a valid field" ; exit 2;; esac'
NVCC = "echo compute_80; echo compute_86; echo compute_90"


@pytest.mark.parametrize("setting, smi, nvcc, expected", [
    ("AUTO", "echo 9.0", NVCC, "90a-real"),
    ("AUTO", "echo 8.0", NVCC, "80-real"),
    ("AUTO", "echo 8.6; echo 9.0; echo 8.6", NVCC, "86-real;90a-real"),
    ("AUTO", "echo 12.0", NVCC, "80-virtual"),  # nvcc does not know it: PTX
    ("AUTO", NO_QUERY, NVCC, "80;90a-real"),  # a driver that does not tell
    ("AUTO", "echo 7.5", NVCC, "its kernels need compute capability 8.0, this GPU has 7.5"),
    ("AUTO", "echo 9.0", None, "no nvcc"),
    ("AUTO", "echo 'NVIDIA-SMI has failed'; exit 9", NVCC, "no GPU (MIRAGE_CUDA=on builds it all the same)"),
    ("ON", "exit 9", NVCC, "80;90a-real"),
    ("OFF", "echo 9.0", NVCC, "MIRAGE_CUDA=OFF"),
])  # fmt: skip
def test_cuda_is_built_where_nvcc_and_a_gpu_are(setting, smi, nvcc, expected, tmp_path):
    cmake = shutil.which("cmake")
    if Path("/proc/driver/nvidia/gpus").exists() and "exit 9" in smi:
        pytest.skip("this machine has a GPU, also where nvidia-smi fails")
    script(tmp_path / "bin/nvidia-smi", smi)
    compiler = script(tmp_path / "cuda/nvcc", nvcc) if nvcc else tmp_path / "none/nvcc"
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CUDACXX": str(compiler)}
    command = [cmake, f"-DMIRAGE_CUDA={setting}", "-P", str(ROOT / "cmake/cuda.cmake")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == f"-- CUDA library: {expected}"


# ---- the folder that keeps what was compiled -------------------------------------------------------------------------


def write_cache(build: Path, **entries: str | Path) -> None:
    build.mkdir(parents=True, exist_ok=True)
    lines = ["# comment=x", "//help=y", *(f"{name}:INTERNAL={value}" for name, value in entries.items())]
    (build / "CMakeCache.txt").write_text("\n".join(lines))


@pytest.mark.parametrize("changed, problem", [
    ({}, ""),
    ({"CMAKE_HOME_DIRECTORY": "/elsewhere"}, "it is of the folder /elsewhere"),
    ({"CMAKE_CACHEFILE_DIR": "/elsewhere/build"}, "it is of the folder /elsewhere/build"),
    ({"CMAKE_GENERATOR": "Unix Makefiles"}, "it is of the generator Unix Makefiles"),
    ({"CMAKE_CXX_COMPILER": "/bin/cat"}, "it is of the compiler /bin/cat"),
    ({"CMAKE_CXX_COMPILER": "/gone/c++"}, "it is of the compiler /gone/c++"),
])  # fmt: skip
def test_caches_of_another_folder_generator_or_compiler_are_thrown_away(changed, problem, tmp_path):
    build = tmp_path / "build"
    entries = {
        "CMAKE_HOME_DIRECTORY": tmp_path, "CMAKE_CACHEFILE_DIR": build, "CMAKE_GENERATOR": "Ninja",
        "CMAKE_CXX_COMPILER": "/bin/sh",
    }  # fmt: skip
    write_cache(build, **{**entries, **changed})
    assert cmake_build.cache_problem(build, tmp_path, "Ninja", "/bin/sh") == problem


def test_no_cache_is_no_problem_but_leftovers_are(tmp_path):
    assert cmake_build.cache_problem(tmp_path / "none", tmp_path, "Ninja", "/bin/sh") == ""
    (tmp_path / "left").mkdir()
    assert cmake_build.cache_problem(tmp_path / "left", tmp_path, "Ninja", "/bin/sh") == ""
    (tmp_path / "left/build.ninja").touch()
    assert cmake_build.cache_problem(tmp_path / "left", tmp_path, "Ninja", "/bin/sh") == "it has no cache"


CONFIGURE = """
import sys; sys.path.insert(0, '_build')
from setuptools.dist import Distribution
import cmake_build
command = cmake_build.CMakeBuild(Distribution({'name': 'x', 'version': '1'}))
command.folder = cmake_build.ROOT / 'build' / 'cmake'
print(command.configure())
"""


@pytest.mark.skipif(not (shutil.which("ninja") and cmake_build.compiler()), reason="needs ninja and a compiler")
def test_a_configured_checkout_can_be_copied_and_renamed(checkout, tmp_path):
    settings = {"MIRAGE_CUDA": "off"}
    first = build(checkout, CONFIGURE, tmp_path / "out", env=settings)
    assert first.returncode == 0 and "starts afresh" not in first.stderr, first.stderr
    again = build(checkout, CONFIGURE, tmp_path / "out", env=settings)
    assert again.returncode == 0 and "starts afresh" not in again.stderr, again.stderr  # what was compiled is kept
    copy = tmp_path / "a copy é"
    shutil.copytree(checkout, copy)
    moved = build(copy, CONFIGURE, tmp_path / "out", env=settings)
    assert moved.returncode == 0, moved.stdout + moved.stderr
    assert f"starts afresh: it is of the folder {checkout}" in moved.stderr
    assert cmake_build.cache_entries(copy / "build/cmake")["CMAKE_HOME_DIRECTORY"] == str(copy)


# ---- where it is built -----------------------------------------------------------------------------------------------


def contents(archive: Path) -> set[str]:
    if archive.suffix == ".whl":
        return set(zipfile.ZipFile(archive).namelist())
    return {name.partition("/")[2] for name in tarfile.open(archive).getnames()}


def give_up_overriding_modes() -> None:
    """In a child that runs as root: modes hold for it too, as for every other user."""
    pr_capbset_drop, cap_dac_override = 24, 1
    if os.geteuid() == 0 and ctypes.CDLL(None, use_errno=True).prctl(pr_capbset_drop, cap_dac_override, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


@pytest.fixture
def unwritable(checkout: Path):
    folders = [checkout, *(path for path in checkout.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    yield checkout
    for folder in folders:
        folder.chmod(0o755)


def build_unwritable(checkout: Path, code: str, output: Path, **settings: str) -> subprocess.CompletedProcess:
    settings = {"PYTHONDONTWRITEBYTECODE": "1", **settings}
    return build(checkout, code, output, env=settings, preexec_fn=give_up_overriding_modes)


def test_an_unwritable_checkout_builds_from_a_copy(unwritable, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in unwritable.rglob("*")}
    result = build_unwritable(unwritable, BUILD_WHEEL, tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert f"{unwritable} cannot be written; building in" in result.stderr
    (wheel,) = (tmp_path / "out").iterdir()
    assert {"mirage/__init__.py", "mirage_kernels/__init__.py", "mirage_kernels/py.typed"} <= contents(wheel)
    assert {path: path.stat().st_mtime_ns for path in unwritable.rglob("*")} == before


def test_an_editable_installation_of_an_unwritable_checkout_is_refused(unwritable, tmp_path):
    result = build_unwritable(unwritable, BUILD_EDITABLE, tmp_path / "out")
    assert result.returncode == 1
    assert f"puts its libraries into {unwritable}, which cannot be written" in result.stderr


def test_source_distributions_are_complete(checkout, tmp_path):
    code = "import sys; sys.path.insert(0, '_build'); import backend; backend.build_sdist(sys.argv[1])"
    result = build(checkout, code, tmp_path / "out")
    assert result.returncode == 0, result.stderr
    (archive,) = (tmp_path / "out").iterdir()
    names = contents(archive)
    assert {"_build/backend.py", "cmake/cuda.cmake", "csrc/python/module.cpp", "setup.py"} <= names
    assert {f"csrc/{p.relative_to(ROOT / 'csrc')}" for p in (ROOT / "csrc").rglob("*") if p.is_file()} <= names
    assert not any(name.endswith(".so") or name.startswith("build/") for name in names)


def test_wheels_have_nothing_of_earlier_builds(checkout, tmp_path):
    module = checkout / "mirage/gone.py"
    module.touch()
    assert build(checkout, BUILD_WHEEL, tmp_path / "first").returncode == 0
    module.unlink()
    assert build(checkout, BUILD_WHEEL, tmp_path / "second").returncode == 0
    for folder, there in (("first", True), ("second", False)):
        (wheel,) = (tmp_path / folder).iterdir()
        assert ("mirage/gone.py" in contents(wheel)) == there


def test_two_builds_of_a_checkout_wait_for_each_other(checkout, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    environment = {**os.environ, "MIRAGE_SKIP_NATIVE": "1"}
    command = [sys.executable, "-c", BUILD_WHEEL, str(output)]
    with backend.locked(checkout / "build/.lock"):
        second = subprocess.Popen(command, cwd=checkout, env=environment, stderr=subprocess.PIPE, text=True)
        assert second.stderr is not None
        lines = iter(second.stderr.readline, "")
        assert any("waiting for another build" in line for line in lines)
        assert second.poll() is None and not list(output.iterdir())
    errors = second.communicate()[1]
    assert second.returncode == 0, errors
    assert len(list(output.iterdir())) == 1


@pytest.mark.slow
def test_a_read_only_folder_compiles(unwritable, tmp_path):
    result = build_unwritable(unwritable, BUILD_WHEEL, tmp_path / "out", MIRAGE_SKIP_NATIVE="", MIRAGE_CUDA="off")
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = (tmp_path / "out").iterdir()
    assert any(name.startswith("mirage_kernels/_native.") for name in contents(wheel))


# ---- the wheel -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library, tag, problem", [
    (b"\x7fELF libstdc++.so.6", "manylinux_2_34_x86_64", None),
    (b"\x7fELF libgomp.so.1", "manylinux_2_34_x86_64", "links libgomp"),
    (b"\x7fELF", "linux_x86_64", "its platform is no manylinux"),
    (f"\x7fELF {ROOT}/csrc/a.h".encode(), "manylinux_2_34_x86_64", f"names {ROOT}"),
    (None, "manylinux_2_34_x86_64", "expected the library _native alone, got none"),
])  # fmt: skip
def test_wheels_that_cannot_be_given_away(library, tag, problem, tmp_path):
    from tools import check_wheel

    wheel = tmp_path / f"mirage_kernels-1-cp311-cp311-{tag}.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("mirage_kernels/__init__.py", "")
        if library is not None:
            archive.writestr("mirage_kernels/_native.cpython-311-x86_64-linux-gnu.so", library)
    found = check_wheel.problems(wheel)
    assert len(found) == (problem is not None) and all(problem in line for line in found)
