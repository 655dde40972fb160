"""How much memory this process may still take, by what the system says before it is taken.

A process that takes more than its control group allows is killed without a word, so what is about to take gigabytes
asks first.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["AvailableMemory", "available_memory", "format_bytes"]

NO_LIMIT = 1 << 60  # version 1 of control groups says "no limit" by a number above this
RESERVATION = 256 << 20  # a mapping without a file, this large and without pages, is room reserved for later


@dataclass(frozen=True)
class AvailableMemory:
    """``bytes`` that can still be taken, and what sets that bound, in words."""

    bytes: int
    bound: str


def available_memory(root: Path = Path("/")) -> AvailableMemory | None:
    """The tightest bound on what this process can still take; None where the system tells of none.

    Bounds are the machine's available memory, the limit of every control group above this process (versions 1 and 2;
    cached files count as available), and the process's own limits on addresses and data (``ulimit -v``, ``-d``; room
    that the process has reserved and not used counts as available). Swap space does not count.

    Args:
        root: where ``proc`` and ``sys`` lie; for tests.
    """
    bounds = [*_machine(root), *_control_groups(root), *_process(root)]
    return min(bounds, key=lambda bound: bound.bytes, default=None)


def format_bytes(count: float) -> str:
    """As people say it: ``"1.5 GiB"``, ``"320 MiB"``, ``"0.25 MiB"``."""
    if count >= 2**30:
        return f"{count / 2**30:.1f} GiB"
    return f"{count / 2**20:.0f} MiB" if count >= 10 * 2**20 else f"{count / 2**20:.2g} MiB"


def _machine(root: Path) -> Iterator[AvailableMemory]:
    free = _table(root / "proc/meminfo").get("MemAvailable")
    if free is not None:
        yield AvailableMemory(free * 1024, "available memory of the machine")


def _control_groups(root: Path) -> Iterator[AvailableMemory]:
    for folder, version in _group_folders(root):
        limit_file, used_file = (
            ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        )
        limit, used = _number(folder / limit_file), _number(folder / used_file)
        if limit is None or used is None or limit >= NO_LIMIT:
            continue
        statistics, whole = _table(folder / "memory.stat"), "" if version == 2 else "total_"
        inactive = statistics.get(f"{whole}inactive_file", 0)
        mapped = statistics.get("file_mapped" if version == 2 else "total_mapped_file", 0)
        cached = max(inactive, inactive + statistics.get(f"{whole}active_file", 0) - mapped)
        left = max(0, limit - max(0, used - cached))
        yield AvailableMemory(left, f"memory limit of the control group, {format_bytes(limit)}")


def _group_folders(root: Path) -> Iterator[tuple[Path, int]]:
    """The folders of the groups that this process is in, up to the outermost to be seen; the version of each."""
    places: dict[int, str] = {}  # of version 1 and 2
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, place = rest.partition(":")
        if controllers == "" or "memory" in controllers.split(","):
            places[2 if controllers == "" else 1] = place
    for line in _text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        mounted, kind = before.split(), after.split()
        if len(mounted) < 5 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        version = 2 if kind[0] == "cgroup2" else 1
        if version == 1 and "memory" not in kind[2].split(","):
            continue
        if version not in places:
            continue
        place = places[version]
        top = root / mounted[4].lstrip("/")
        shown = mounted[3].rstrip("/")  # in a container the mount may begin at the container's own group
        below = place[len(shown) :].strip("/") if place == shown or place.startswith(shown + "/") else ""
        folder = top / below
        while True:
            yield folder, version
            if folder == top:
                break
            folder = folder.parent


def _process(root: Path) -> Iterator[AvailableMemory]:
    if sys.platform != "linux":
        return
    import resource

    used = _table(root / "proc/self/status")
    limits = (
        (resource.RLIMIT_AS, "VmSize", "address-space limit (ulimit -v)", False),
        (resource.RLIMIT_DATA, "VmData", "data limit (ulimit -d)", True),
    )
    for which, field, name, writable in limits:
        limit = resource.getrlimit(which)[0]
        if limit != resource.RLIM_INFINITY and field in used:
            left = limit - used[field] * 1024 + _reserved(root, writable)
            yield AvailableMemory(max(0, left), f"{name}, {format_bytes(limit)}")


def _reserved(root: Path, writable: bool) -> int:
    """Bytes of addresses that this process has reserved in large pieces, as arenas do, and that have no pages."""
    total = 0
    mapping = re.compile(
        r"^[0-9a-f]+-[0-9a-f]+ (\S{4}) \S+ \S+ 0 *\nSize: +(\d+) kB\n(?:(?!Rss).*\n)*?Rss: +(\d+) kB", re.M
    )
    for access, size, resident in mapping.findall(_text(root / "proc/self/smaps")):
        if int(size) * 1024 >= RESERVATION and (not writable or access[1] == "w"):
            total += (int(size) - int(resident)) * 1024
    return total


def _table(path: Path) -> dict[str, int]:
    """``name: number`` or ``name number`` of each line that has them."""
    return {name: int(number) for name, number in re.findall(r"^(\w+):?\s+(\d+)", _text(path), re.M)}


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
