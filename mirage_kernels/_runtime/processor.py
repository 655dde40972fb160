"""What this machine's processor is."""

from __future__ import annotations

import platform

__all__ = ["cpu_name", "cpuinfo"]


def cpu_name() -> str:
    """What the processor calls itself."""
    return cpuinfo("model name") or platform.processor() or platform.machine()


def cpuinfo(*keys: str) -> str:
    """The first value of one of ``keys`` in /proc/cpuinfo; empty where there is none, such as outside Linux."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key.strip() in keys:
                    return value.strip()
    except OSError:
        pass
    return ""
