"""Settings that a folder of trainings was begun with, so that none of others come to it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mirage.whole_files import write_whole

__all__ = ["SETTINGS", "differences", "keep_settings"]

SETTINGS = "settings.json"


def keep_settings(folder: Path, format: str, now: Mapping[str, Any], what: str = "trainings") -> None:
    """Compare settings with those in the folder, and add them to it.

    Args:
        format: of the file, a name and a version.
        now: what JSON can say, by name; names that the folder does not know yet are added.
        what: the folder holds, for the message.

    Raises:
        ValueError: the folder holds others; the message says which. Or its file is damaged.
    """
    path, now = folder / SETTINGS, json.loads(json.dumps(now))
    before: dict[str, Any] = {}
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(before, dict) or before.pop("format", None) != format:
                raise ValueError(f"expected the format {format!r}")
        except ValueError as error:
            raise ValueError(f"{path}: not readable as the settings of trainings: {error}") from error
        found = differences(before, {name: value for name, value in now.items() if name in before})
        if found:
            more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
            raise ValueError(
                f"{folder}: holds {what} of other settings ({'; '.join(found[:3])}{more}); name another folder"
            )
    if {**before, **now} != before:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, (json.dumps({"format": format, **before, **now}, indent=1) + "\n").encode("utf-8"))


def differences(before: Any, now: Any, place: str = "") -> list[str]:
    """Where two trees of settings differ, as ``schedule.steps: 10 there, 20 here``."""
    if isinstance(before, dict) and isinstance(now, dict):
        found = []
        for key in [*before, *(key for key in now if key not in before)]:
            if key in before and key in now:
                found += differences(before[key], now[key], f"{place}.{key}" if place else key)
            elif place:
                found.append(f"{place}.{key}: {before.get(key, 'absent')!r} there, {now.get(key, 'absent')!r} here")
        return found
    return [] if before == now else [f"{place}: {before!r} there, {now!r} here"]
