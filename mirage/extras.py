"""Optional libraries: whether they are there, and what to install where they are not."""

from __future__ import annotations

import importlib.util

__all__ = ["is_there", "not_there"]

PACKAGES = {"PIL": "pillow", "lightning_fabric": "lightning-fabric", "skimage": "scikit-image",
            "sklearn": "scikit-learn", "yaml": "pyyaml"}  # fmt: skip
"""Modules that have another name than the package that brings them."""


def is_there(module: str) -> bool:
    """Whether a module can be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # imported, or kept from it, without a specification
        return False


def not_there(extra: str, *modules: str) -> str | None:
    """What to tell the user where one of ``modules`` is missing: which packages, and the extra that brings them."""
    missing = [PACKAGES.get(module, module) for module in modules if not is_there(module)]
    return f"{', '.join(missing)} not installed; try: pip install 'mirage-kernels[{extra}]'" if missing else None
