"""``mirage demo``: a page in the browser, on this machine alone, to restore one picture at a time.

Needs the extra ``demo``. The page is bound to 127.0.0.1, loads nothing from elsewhere and reports nothing to anybody.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mirage.lazy import lazily

if TYPE_CHECKING:
    from mirage.demo.page import build, serve
    from mirage.demo.session import Limits, Restored, Studio

__all__ = ["Limits", "Restored", "Studio", "build", "serve"]

_PLACES = {"Limits": "session", "Restored": "session", "Studio": "session", "build": "page", "serve": "page"}


# The command line imports this package for its options alone.
__getattr__, __dir__ = lazily(__name__, _PLACES)
