"""How kernels are given their arguments: by name, in any order, all of them."""

import pytest
import torch
from harness import require


@pytest.fixture(scope="module")
def launch():
    require("triton")
    from mirage_kernels._triton import launch

    return launch


@pytest.fixture(scope="module")
def kernel():
    require("triton")
    from mirage_kernels.channel_layer_norm.triton import _forward_kernel

    return _forward_kernel


def arguments():
    names = ("p_x", "p_weight", "p_bias", "p_y", "p_mean", "p_rstd", "eps", "N", "W", "s_b", "s_c", "s_row", "s_pixel")
    constants = {"C": 8, "BLOCK_C": 8, "BLOCK_N": 16, "LINE": True, "INT64": False}
    return {name: i for i, name in enumerate(names)}, constants | {"num_warps": 4}


def seen(launch, kernel, *args, **named):
    """What the hook is told, which tuning and tools know a launch by."""
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "launch_hook", lambda *call: calls.append(call))
        launch.launch(kernel, 3, torch.device("cpu"), *args, **named)
    return calls[0]


def test_by_name_in_any_order(launch, kernel):
    ordered, options = arguments()
    expected = (kernel, 3, tuple(range(13)), options)
    assert seen(launch, kernel, **ordered, **options) == expected
    assert seen(launch, kernel, **options, **dict(reversed(ordered.items()))) == expected
    assert seen(launch, kernel, *range(13), **options) == expected
    assert seen(launch, kernel, 0, 1, **dict(list(ordered.items())[2:]), **options) == expected


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda named: named.pop("p_bias"), r"missing arguments \['p_bias'\], unknown or repeated ones \[\]"),
        (lambda named: named.pop("BLOCK_N"), r"missing arguments \['BLOCK_N'\]"),
        (lambda named: named.update(p_shift=1), r"missing arguments \[\], unknown or repeated ones \['p_shift'\]"),
    ],
)
def test_errors_name_the_argument(launch, kernel, change, message):
    ordered, options = arguments()
    named = ordered | options
    change(named)
    with pytest.raises(TypeError, match=f"_forward_kernel: .*{message}"):
        seen(launch, kernel, **named)
    ordered, options = arguments()
    with pytest.raises(TypeError, match=r"unknown or repeated ones \['p_x'\]"):
        seen(launch, kernel, 0, **ordered, **options)


def test_strides_of_a_single_column_are_those_of_its_rows(launch):
    x = torch.empty(120).as_strided((2, 3, 5, 1), (60, 20, 4, 7))
    assert launch.plane_strides(x, "sg") == {"sg_b": 60, "sg_c": 20, "sg_row": 4, "sg_pixel": 4}
    assert launch.image_strides(x) == {"s_b": 60, "s_c": 20, "s_row": 4, "s_pixel": 7}
