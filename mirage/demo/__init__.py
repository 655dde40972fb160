"""``mirage demo``: a page in the browser, on this machine alone, to restore one picture at a time.

Needs the extra ``demo``. The page is bound to 127.0.0.1, loads nothing from elsewhere and reports nothing to anybody.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mirage.demo.page import build, serve
    from mirage.demo.session import Limits, Restored, Studio

__all__ = ["Limits", "Restored", "Studio", "build", "serve"]

_PLACES = {"Limits": "session", "Restored": "session", "Studio": "session", "build": "page", "serve": "page"}


def __getattr__(name: str) -> Any:
    """Import a name's module on first use: the command line imports this package for its options alone."""
    if name in _PLACES:
        return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
