"""The dtypes of a CPU in turns, and which of them `mirage doctor` recommends."""

import io

import pytest
from rich.console import Console

from mirage import doctor
from mirage.dtype_speeds import DtypeSpeed, compare_dtypes, fastest


def test_each_round_is_compared_with_its_own_float32():
    """A machine that is busy in one round slows all dtypes of it: ratios of the rounds do not see it."""
    times = iter([10.0, 5.0, 20.0, 40.0, 20.0, 80.0, 10.0, 4.0, 20.0])
    ran = []

    def clock(call):
        ran.append(call())
        return next(times)

    speeds = compare_dtypes(3, clock)
    assert [str(y.dtype).removeprefix("torch.") for y in ran[:3]] == ["float32", "bfloat16", "float16"]
    assert all(y.isfinite().all() for y in ran)
    assert speeds == (
        DtypeSpeed("float32", 10.0, 1.0),
        DtypeSpeed("bfloat16", 5.0, 2.0),
        DtypeSpeed("float16", 20.0, 0.5),
    )


@pytest.mark.parametrize(("half", "chosen"), [(1.6, "bfloat16"), (1.02, "float32"), (0.7, "float32")])
def test_another_dtype_is_recommended_where_it_is_clearly_faster(half, chosen):
    speeds = (DtypeSpeed("float32", 8.0, 1.0), DtypeSpeed("bfloat16", 8.0 / half, half))
    assert fastest(speeds) == chosen
    text = io.StringIO()
    doctor.render(doctor.Report({}, [], {}, (), (), speeds), Console(file=text, width=120))
    assert f"{chosen} is the fastest" in text.getvalue()
    assert f"{half:.2f}" in text.getvalue()


def test_it_needs_a_round():
    with pytest.raises(ValueError, match="rounds: expected at least 1, got 0"):
        compare_dtypes(0)
