"""Whether a wheel can be given away: ``python tools/check_wheel.py dist/*.whl``.

It has a manylinux tag and the CPU library, no OpenMP of its own (the library uses PyTorch's), no CUDA, and names no
folder of the machine that built it. Exit status 1, and why, where it does not.
"""

from __future__ import annotations

import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def problems(wheel: Path) -> list[str]:
    """What is wrong with the wheel."""
    found = [] if "manylinux" in wheel.name else [f"its platform is no manylinux: {wheel.name}"]
    folders = {str(folder) for folder in (ROOT, Path.home(), Path(tempfile.gettempdir()), Path(sys.prefix))}
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        libraries = [name for name in names if ".so" in Path(name).suffixes]
        if [Path(name).name.partition(".")[0] for name in libraries] != ["_native"]:
            found.append(f"expected the library _native alone, got {', '.join(libraries) or 'none'}")
        for name in names:
            data = archive.read(name)
            found += [f"{name} names {folder}" for folder in sorted(folders) if f"{folder}/".encode() in data]
            if name in libraries and b"libgomp.so" in data:
                found.append(f"{name} links libgomp; PyTorch's is to be used")
    return found


def main(paths: list[str]) -> int:
    if not paths:
        print(__doc__, file=sys.stderr)
        return 2
    failed = False
    for path in map(Path, paths):
        wrong = problems(path)
        failed |= bool(wrong)
        for line in wrong or [f"good, {path.stat().st_size >> 10} KiB"]:
            print(f"{path.name}: {line}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
