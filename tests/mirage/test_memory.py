"""What the system is asked before memory is taken: machine, control groups of both versions, the process's limits."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mirage.memory import available_memory, format_bytes

GIB, MIB = 1 << 30, 1 << 20


def tree(root: Path, files: dict[str, object]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def mounts(version: int, shown: str = "/") -> str:
    if version == 2:
        return f"36 24 0:30 {shown} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup rw,nsdelegate"
    return (
        "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n"
        "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
        f"35 31 0:32 {shown} /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory"
    )


MACHINE = {"proc/meminfo": "MemTotal: 33554432 kB\nMemFree: 1000 kB\nMemAvailable: 16777216 kB"}


def test_the_machine_alone(tmp_path) -> None:
    found = available_memory(tree(tmp_path, MACHINE))
    assert found.bytes == 16 * GIB and found.bound == "available memory of the machine"


def test_nothing_is_known_where_the_system_tells_nothing(tmp_path) -> None:
    assert available_memory(tmp_path) is None


def test_version_2_takes_the_tightest_group_above(tmp_path) -> None:
    group = "sys/fs/cgroup/a.slice"
    files = {
        **MACHINE,
        "proc/self/cgroup": "0::/a.slice/b.scope",
        "proc/self/mountinfo": mounts(2),
        f"{group}/b.scope/memory.max": "max",
        f"{group}/b.scope/memory.current": 1 * GIB,
        f"{group}/memory.max": 3 * GIB,
        f"{group}/memory.current": 2 * GIB,
        f"{group}/memory.stat": f"anon 5\ninactive_file {300 * MIB}\nactive_file {200 * MIB}\nfile_mapped {100 * MIB}",
    }
    found = available_memory(tree(tmp_path, files))
    assert found.bytes == 1 * GIB + 400 * MIB  # cached files can go, but for those in use
    assert found.bound == "memory limit of the control group, 3.0 GiB"


def test_version_1(tmp_path) -> None:
    group = "sys/fs/cgroup/memory/job"
    files = {
        **MACHINE,
        "proc/self/cgroup": "9:name=systemd:/\n5:cpu,cpuacct:/other\n4:memory:/job\n0::/",
        "proc/self/mountinfo": mounts(1),
        f"{group}/memory.limit_in_bytes": 2 * GIB,
        f"{group}/memory.usage_in_bytes": 1 * GIB,
        f"{group}/memory.stat": f"inactive_file 7\ntotal_inactive_file {100 * MIB}\ntotal_mapped_file 9",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": 9223372036854771712,
        "sys/fs/cgroup/memory/memory.usage_in_bytes": 3 * GIB,
    }
    assert available_memory(tree(tmp_path, files)).bytes == 1 * GIB + 100 * MIB


@pytest.mark.parametrize("version", [1, 2])
def test_in_a_container_the_mount_begins_at_its_group(version, tmp_path) -> None:
    memory, limit, used = (
        ("memory/", "memory.limit_in_bytes", "memory.usage_in_bytes")
        if version == 1
        else ("", "memory.max", "memory.current")
    )
    files = {
        **MACHINE,
        "proc/self/cgroup": "4:memory:/docker/abc" if version == 1 else "0::/docker/abc",
        "proc/self/mountinfo": mounts(version, "/docker/abc"),
        f"sys/fs/cgroup/{memory}{limit}": 4 * GIB,
        f"sys/fs/cgroup/{memory}{used}": 3 * GIB,
    }
    assert available_memory(tree(tmp_path, files)).bytes == 1 * GIB


def test_a_group_over_its_limit_leaves_nothing(tmp_path) -> None:
    files = {
        **MACHINE,
        "proc/self/cgroup": "0::/",
        "proc/self/mountinfo": mounts(2),
        "sys/fs/cgroup/memory.max": GIB,
        "sys/fs/cgroup/memory.current": 2 * GIB,
    }
    assert available_memory(tree(tmp_path, files)).bytes == 0


def in_a_shell(limit: str, code: str) -> str:
    command = f'{limit} && exec "{sys.executable}" -c "$0"'
    return subprocess.run(["bash", "-c", command, code], capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build of PyTorch takes more address space by itself")
@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say how many addresses are in use")
def test_the_address_limit_and_what_is_reserved_under_it() -> None:
    code = (
        "import mmap\n"
        "from mirage.memory import available_memory as ask\n"
        "first = ask(); print(first.bytes, first.bound)\n"
        "room = mmap.mmap(-1, 512 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
        "print(ask().bytes - first.bytes)\n"
        "room[: 128 << 20] = bytes(128 << 20)\n"
        "print(ask().bytes - first.bytes)\n"
    )
    first, reserved, used = in_a_shell(f"ulimit -v {2 << 20}", code).splitlines()
    count, bound = re.fullmatch(r"(\d+) (.*)", first).groups()
    assert bound == "address-space limit (ulimit -v), 2.0 GiB" and 1 * GIB < int(count) < 2 * GIB
    assert abs(int(reserved)) < 8 * MIB  # reserved, without pages: still to be had
    assert abs(int(used) + 128 * MIB) < 8 * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say how much data there is")
def test_the_data_limit() -> None:
    code = "from mirage.memory import available_memory as ask; print(ask().bytes, ask().bound)"
    count, bound = re.fullmatch(r"(\d+) (.*)\n", in_a_shell(f"ulimit -d {3 << 19}", code)).groups()
    assert bound == "data limit (ulimit -d), 1.5 GiB" and 0.5 * GIB < int(count) < 1.5 * GIB


def test_bytes_as_people_say_them() -> None:
    assert [format_bytes(n) for n in (0, MIB // 32, MIB, 320 * MIB, GIB - 1, 3 * GIB // 2)] == [
        "0 MiB",
        "0.031 MiB",
        "1 MiB",
        "320 MiB",
        "1024 MiB",
        "1.5 GiB",
    ]
