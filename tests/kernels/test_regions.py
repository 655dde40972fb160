"""Stages on parts of a map: sums, statistics and results as of the whole map's stages."""

import pytest
import torch
from harness import forced, relative_error, require

import mirage_kernels
from mirage_kernels import FeedForwardWeights, mixer_stage, regions
from mirage_kernels.feed_forward_stage import cases as feed_forward_cases
from mirage_kernels.feed_forward_stage import reference as feed_forward_reference
from mirage_kernels.mixer_stage import cases
from mirage_kernels.mixer_stage import reference as mixer_reference
from mirage_kernels.regions import RegionStatistics, Window

SHAPES = ((1, 24, 21, 34, 1), (2, 12, 5, 7, 2), (1, 48, 40, 19, 2), (1, 9, 1, 1, 3), (1, 6, 1, 13, 1), (2, 6, 11, 1, 2))
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@pytest.fixture(params=["cpp", "torch"])
def impl(request):
    require(request.param)
    with forced(request.param):
        yield request.param


def mixer_case(shape, dtype=torch.float32):
    """x and weights of a dtype, and in float64."""
    found = []
    for of in (dtype, torch.float64):
        x, *learned = (t.to(dtype).to(of) for t in cases.make(shape, torch.Generator().manual_seed(0)))
        found += [x, cases.with_statistics(learned)]
    return found


def feed_forward_case(shape, dtype=torch.float32):
    found = []
    for of in (dtype, torch.float64):
        x, *weights = (t.to(dtype).to(of) for t in feed_forward_cases.make(shape[:4], torch.Generator().manual_seed(0)))
        found += [x, FeedForwardWeights(*weights)]
    return found


def part(x, first, stop, halo):
    """Rows of x with a halo where there is one, and where they lie."""
    above, below = max(0, first - halo), min(x.shape[2], stop + halo)
    return x[:, :, above:below], Window(x.shape[2], x.shape[3], above, 0)


def in_strips(x, weights, rows):
    """The mixer of a map in strips."""
    batch, _, height, width = x.shape
    strips = [(first, min(first + rows, height)) for first in range(0, height, rows)]
    total = sum(
        regions.mixer_stage_sums(part(x, *strip, 1)[0], weights, part(x, *strip, 1)[1], strip, (0, width))
        for strip in strips
    )
    statistics = regions.mixer_stage_statistics(total, height * width, weights, x.dtype)
    done = []
    for strip in strips:
        window, where = part(x, *strip, 3)
        done.append(regions.mixer_stage_apply(window, weights, statistics, where, strip, (0, width)))
    return torch.cat(done, 2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_strips_are_the_whole(impl, shape, dtype):
    x, weights, exact, exact_weights = mixer_case(shape, dtype)
    truth = mixer_reference(exact, exact_weights).y
    for rows in {1, 2, 3, 8, shape[2]}:
        assert relative_error(in_strips(x, weights, rows), truth) < TOLERANCES[dtype], rows


def test_the_whole_map_is_the_stage_bit_for_bit():
    require("cpp")
    for shape in SHAPES:
        for dtype in TOLERANCES:
            x, weights, *_ = mixer_case(shape, dtype)
            with mirage_kernels.use("cpp"), torch.no_grad():
                assert torch.equal(in_strips(x, weights, shape[2]), mixer_stage(x, weights).y)


def test_sums_are_of_the_definition(impl):
    shape = (2, 12, 9, 10, 2)
    x, weights, exact, exact_weights = mixer_case(shape)
    window, rows, columns = Window(*x.shape[2:]), (0, 1, 5, 9), (0, 4, 10)
    found = regions.mixer_stage_sums(x, weights, window, rows, columns)
    assert found.shape == (2, 3, 2, 4 * 2 + 3 * 4) and found.dtype == torch.float64
    normal = torch.nn.functional.layer_norm(exact.movedim(1, 3), (12,)).movedim(3, 1)
    normal = normal * exact_weights.norm_weight.view(-1, 1, 1) + exact_weights.norm_bias.view(-1, 1, 1)
    qkv = torch.conv2d(torch.conv2d(normal[:, :4], exact_weights.qkv), exact_weights.qkv_dwconv, padding=1, groups=12)
    for i in range(3):
        for j in range(2):
            cell = slice(rows[i], rows[i + 1]), slice(columns[j], columns[j + 1])
            q, k, _ = (t[:, :, cell[0], cell[1]].flatten(2) for t in qkv.chunk(3, 1))
            gram = torch.cat([q[:, h : h + 2] @ k[:, h : h + 2].mT for h in (0, 2)], 1).flatten(1)
            branch = normal[:, 4:8, cell[0], cell[1]].sum((2, 3))
            expected = torch.cat((gram, q.square().sum(2), k.square().sum(2), branch), 1)
            torch.testing.assert_close(found[:, i, j], expected, rtol=1e-5, atol=1e-5)


def test_a_region_inside_reads_its_neighbours(impl):
    """A rectangle cut out with its halo gives that part of the whole, with any strides, into a part of a tensor."""
    x, weights, *_ = mixer_case((2, 12, 17, 23, 2))
    window, rows, columns = Window(17, 23), (0, 17), (0, 23)
    sums = regions.mixer_stage_sums(x, weights, window, rows, columns)
    statistics = regions.mixer_stage_statistics(sums, 17 * 23, weights, x.dtype)
    whole = regions.mixer_stage_apply(x, weights, statistics, window, rows, columns)
    cut = x[:, :, 2:14, 5:20].to(memory_format=torch.channels_last)
    out = torch.full((2, 12, 20, 30), torch.nan)
    inner = out[:, :, 3:9, 7:16]
    region = Window(17, 23, 2, 5), (5, 11), (8, 17)
    result = regions.mixer_stage_apply(cut, weights, statistics, *region, out=inner)
    assert result is inner
    torch.testing.assert_close(inner, whole[:, :, 5:11, 8:17], rtol=1e-5, atol=1e-5)
    assert out.isnan().sum() == out.numel() - inner.numel()
    of_cut, of_map = (regions.mixer_stage_sums(t, weights, w, *region[1:]) for t, w in ((cut, region[0]), (x, window)))
    torch.testing.assert_close(of_cut, of_map, rtol=1e-5, atol=1e-5)


def test_cells_have_matrices_of_their_own(impl):
    """Each cell of a grid is what its statistics alone give."""
    x, weights, *_ = mixer_case((1, 12, 14, 11, 2))
    window, rows, columns = Window(14, 11), (0, 3, 4, 14), (0, 5, 11)
    sums = regions.mixer_stage_sums(x, weights, window, rows, columns)
    pixels = torch.tensor([[15.0, 18], [5, 6], [50, 60]])
    statistics = regions.mixer_stage_statistics(sums, pixels, weights, x.dtype)
    assert statistics.attention.shape == (1, 3, 2, 2, 6, 2) and statistics.kernels.shape == (1, 3, 2, 4, 49)
    assert not torch.allclose(statistics.kernels[:, 0, 0], statistics.kernels[:, 2, 1], rtol=1e-2)
    grid = regions.mixer_stage_apply(x, weights, statistics, window, rows, columns)
    for i in range(3):
        for j in range(2):
            one = RegionStatistics(*(t[:, i : i + 1, j : j + 1] for t in statistics))
            whole = regions.mixer_stage_apply(x, weights, one, window, (0, 14), (0, 11))
            cell = slice(rows[i], rows[i + 1]), slice(columns[j], columns[j + 1])
            torch.testing.assert_close(*(t[:, :, cell[0], cell[1]] for t in (grid, whole)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_feed_forward_in_strips(impl, shape, dtype):
    x, weights, exact, exact_weights = feed_forward_case(shape, dtype)
    truth, width = feed_forward_reference(exact, *exact_weights, eps=1e-5), x.shape[3]
    for rows in {1, 3, shape[2]}:
        strips = [(first, min(first + rows, shape[2])) for first in range(0, shape[2], rows)]
        done = []
        for strip in strips:
            window, where = part(x, *strip, 1)
            done.append(regions.feed_forward_stage_region(window, weights, where, strip, (0, width)))
        assert relative_error(torch.cat(done, 2), truth) < TOLERANCES[dtype], rows


@pytest.mark.parametrize("norm", ["centred", "uncentred"])
def test_feed_forward_of_other_forms_in_strips(impl, norm):
    """Biases of convolutions and no GELU: where a strip ends the map goes on, and the hidden tensor is not zero."""
    generator, names = torch.Generator().manual_seed(3), FeedForwardWeights._fields[:8]
    x, *tensors = feed_forward_cases.make((1, 5, 17, 9), generator, 2.6, names)
    weights, form = FeedForwardWeights(*tensors), {"norm": norm, "activation": "none"}
    done = []
    for strip in ((0, 4), (4, 11), (11, 17)):
        window, where = part(x, *strip, 1)
        done.append(regions.feed_forward_stage_region(window, weights, where, strip, (0, 9), **form))
    assert relative_error(torch.cat(done, 2), feed_forward_reference(x, *weights, **form)) < 1e-13


def test_no_means_of_a_part():
    x, *tensors = feed_forward_cases.make((1, 5, 6, 9), torch.Generator(), 1, FeedForwardWeights._fields)
    with pytest.raises(ValueError, match="excite: expected None, since a part of a map has no means of all of it"):
        regions.feed_forward_stage_region(x, FeedForwardWeights(*tensors), Window(6, 9), (0, 6), (0, 9))


def test_nan_stays_where_it_is(impl):
    """One that is not a number makes the sums of its cell so, and results up to the kernels' radius away."""
    x, weights, *_ = mixer_case((1, 12, 20, 20, 2))
    window, cuts = Window(20, 20), (0, 10, 20)
    clean = regions.mixer_stage_sums(x, weights, window, cuts, cuts)
    statistics = regions.mixer_stage_statistics(clean, 100, weights, x.dtype)
    x[0, 3, 2, 2] = torch.nan
    sums = regions.mixer_stage_sums(x, weights, window, cuts, cuts)
    assert sums[0, 0, 0].isnan().any()
    assert torch.equal(sums[0, 1], clean[0, 1]) and torch.equal(sums[0, 0, 1], clean[0, 0, 1])
    y = regions.mixer_stage_apply(x, weights, statistics, window, cuts, cuts)
    assert y[0, :, 2, 2].isnan().all() and y[0, :, 5, 5].isnan().any()
    assert y[0, :, 6:].isfinite().all() and y[0, :, :, 6:].isfinite().all()


def test_thread_counts_give_the_same_bits():
    require("cpp")
    x, weights, *_ = mixer_case((1, 24, 64, 96, 2))
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(in_strips(x, weights, 24))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_wrong_arguments(impl):
    x, weights, *_ = mixer_case((1, 12, 14, 11, 2))
    window, rows, columns = Window(14, 11), (0, 14), (0, 11)
    sums = regions.mixer_stage_sums(x, weights, window, rows, columns)
    statistics = regions.mixer_stage_statistics(sums, 154, weights, x.dtype)
    small, lower = Window(13, 11), Window(30, 11, 4)
    for of_sums, match in (
        ((window, (0, 15), columns), "rows: expected at least two ascending"),
        ((window, (3, 3), columns), "rows: expected at least two ascending"),
        ((window, rows, (4,)), "columns: expected at least two"),
        ((small, rows, columns), "window: expected one that holds x"),
        ((lower, (4, 8), columns), "rows: .* halo of 1 pixels"),
    ):
        with pytest.raises(ValueError, match=match):
            regions.mixer_stage_sums(x, weights, *of_sums)
    for of_apply, out, match in (
        ((lower, (6, 9), columns), None, "rows: .* halo of 3 pixels"),
        ((window, (0, 3, 14), columns), None, "attention: expected shape"),
        ((window, rows, columns), x[:, :, :3], "out: expected shape"),
        ((window, rows, columns), torch.empty(1, 12, 11, 14).mT, "out: expected lines without gaps"),
    ):
        with pytest.raises(ValueError, match=match):
            regions.mixer_stage_apply(x, weights, statistics, *of_apply, out=out)
    with pytest.raises(ValueError, match="sums: expected shape"):
        regions.mixer_stage_statistics(sums[..., 1:], 1, weights, x.dtype)
    with pytest.raises(TypeError, match="sums: expected float64"):
        regions.mixer_stage_statistics(sums.float(), 1, weights, x.dtype)
    with pytest.raises(TypeError, match="attention: expected torch.float64 for x of torch.float64"):
        regions.mixer_stage_apply(x.double(), weights, statistics, window, rows, columns)


def test_the_library_checks_what_it_is_given():
    """A call past the public functions cannot read outside a tensor either."""
    require("cpp")
    from mirage_kernels._runtime.library import native, to_dlpack
    from mirage_kernels._runtime.weights import capsules
    from mirage_kernels.regions.checks import sums_of

    x, weights, *_ = mixer_case((1, 12, 14, 11, 2))
    found, w = torch.empty(1, 1, 1, sums_of(weights), dtype=torch.float64), capsules(weights)
    for window, rows, match in (
        ([14, 11, 1, 0], [1, 14], "x: expected a window"),
        ([14, 11, -1, 0], [0, 13], "x: expected a window"),
        ([14, 11, 0, 0], [0, 15], "rows: expected positions from 0 to 14"),
        ([14, 11, 0, 0], [5, 4], "rows: expected ascending"),
        ([20, 11, 3, 0], [3, 9], "rows: expected positions whose halo of 1"),
        ([14, 11, 0], [0, 14], "window: expected height, width, row and column"),
    ):
        with pytest.raises(ValueError, match=match):
            native().mixer_stage_sums(to_dlpack(x), window, rows, [0, 11], w, 1e-5, 1e-5, to_dlpack(found))


def test_what_ran_is_recorded(impl):
    x, weights, *_ = mixer_case((1, 12, 14, 11, 2))
    in_strips(x, weights, 7)
    for operator in ("mixer_stage_sums", "mixer_stage_statistics", "mixer_stage_apply"):
        assert mirage_kernels.last_used(operator) == impl


def test_a_library_of_older_sources_is_told_of(monkeypatch):
    require("cpp")
    from mirage_kernels._runtime import dispatch
    from mirage_kernels.regions import op

    x, weights, *_ = mixer_case((1, 12, 6, 5, 2))
    monkeypatch.setattr(dispatch, "native", object())
    op._tell_of_old_library.cache_clear()
    with pytest.warns(UserWarning, match="the C\\+\\+ library was built from older sources"):
        regions.mixer_stage_sums(x, weights, Window(6, 5), (0, 6), (0, 5))
    assert mirage_kernels.last_used("mixer_stage_sums") == "torch"
