"""The number that tells a library of older sources is counted up with every change of what its functions take."""

import hashlib
import json
import re

import pytest
from harness import require

from mirage_kernels._runtime import dispatch

OF_TESTS = ("kernels", "set_order", "set_multiprocessors")  # what the emulated library has besides
SIGNATURES = {"cpp": "66977be783fc7659", "cuda": "c87d6909bbb4ff72"}
"""Of interface 3."""


def signatures(library) -> dict[str, list]:
    """The names of the arguments of each function and method, and of the weights in each list of them."""
    found = {f"{name} in order": list(weights) for name, weights in library.stage_weights.items()}
    owners = {"": vars(library), **{f"{n}.": vars(c) for n, c in vars(library).items() if isinstance(c, type)}}
    for owner, contents in owners.items():
        for name, function in contents.items():
            first = (getattr(function, "__doc__", None) or "").partition("\n")[0]
            if callable(function) and first.startswith(f"{name}(") and name not in OF_TESTS:
                found[owner + name] = re.findall(r"(\w+): ", first)
    return found


@pytest.mark.parametrize("impl", SIGNATURES)
def test_the_interface_is_counted_up(impl):
    require(impl)
    library = {"cpp": dispatch.native, "cuda": dispatch.cuda}[impl]
    assert library.interface == dispatch.INTERFACE == 3
    found = signatures(library)
    assert len(found) > 10
    digest = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]
    assert digest == SIGNATURES[impl], (
        f"what functions of {library.__name__} take has changed: count INTERFACE up, in dispatch.py and interface.h, "
        f"and here, where the digest is now {digest!r}"
    )
