"""How messages and cards put what they count."""

from __future__ import annotations

__all__ = ["counted"]


def counted(count: int, noun: str) -> str:
    """``"1 image"``, ``"2 images"``, ``"12,000 images"``: of nouns whose plural takes an s."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
