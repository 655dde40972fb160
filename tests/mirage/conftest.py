"""Fixtures that several files of this folder use."""

import pytest
from harness import forced, require


@pytest.fixture(params=("cpp", "composite"))
def impl(request):
    """What the stages of accelerated blocks run on."""
    require(request.param)
    with forced(request.param):
        yield request.param
