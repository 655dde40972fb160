"""What is measured kept in a JSON file, so that a command that was stopped goes on from there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mirage.whole_files import write_whole

__all__ = ["Kept", "fingerprint_of", "read_json"]


class Kept:
    """Entries of a file, each under a digest of everything that it depends on; all are written with each new one.

    Args:
        path: the file, which need not be there yet.
        format: what it says that it is.

    Raises:
        ValueError: the file is something else.
        OSError: it cannot be read.
    """

    def __init__(self, path: str | Path, format: str) -> None:
        self.path, self.format = Path(path), format
        self.entries: dict[str, Any] = {}
        if self.path.exists():
            content = read_json(self.path)
            if content.get("format") != format or not isinstance(content.get("measured"), dict):
                raise ValueError(f"{path}: expected a cache of {format!r}; remove it, or name another file")
            self.entries = content["measured"]

    def find(self, key: str) -> Any:
        """The entry; None where there is none."""
        return self.entries.get(key)

    def add(self, key: str, entry: Any) -> None:
        """Keep an entry, as JSON has it.

        Raises:
            OSError: the file cannot be written.
        """
        self.entries[key] = entry
        content = {"format": self.format, "measured": self.entries}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, (json.dumps(content, indent=1) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """A mapping in a file.

    Raises:
        ValueError: it is none, or no JSON.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a mapping, got {type(content).__name__}")
    return content


def fingerprint_of(descriptor: Any) -> str:
    """What tells a descriptor from others.

    Raises:
        ValueError: it has no ``fingerprint``.
    """
    fingerprint = getattr(descriptor, "fingerprint", None)
    if not isinstance(fingerprint, str):
        raise ValueError(f"cache: needs a descriptor with a fingerprint, and {type(descriptor).__name__} has none")
    return fingerprint
