"""Scratch memory kept between calls by the C++ kernels: bounded, and given back on request."""

import os
import pickle
import resource
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import mirage.fast
import mirage_kernels
from mirage_kernels import workspace

LIMIT = min(2 << 30, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8)
needs_cpp = pytest.mark.skipif(mirage_kernels.available()["cpp"] != "yes", reason="the C++ library is not there")


@needs_cpp
def test_a_step_keeps_a_bounded_workspace():
    torch.manual_seed(0)
    model = mirage.fast.mirage_tiny().train()
    mirage_kernels.release_workspace()
    model(torch.rand(1, 3, 48, 48)).square().mean().backward()
    del model
    assert 0 < mirage_kernels.release_workspace() <= 64 << 20
    assert mirage_kernels.release_workspace() == 0


@needs_cpp
def test_passes_after_the_first_take_no_new_memory():
    """What is kept serves every size and order that the network asks for: the second pass keeps what the first did."""
    model = mirage.fast.mirage_tiny().eval()
    image = torch.rand(1, 3, 96, 96)
    mirage_kernels.release_workspace()
    with torch.inference_mode(), mirage_kernels.use("cpp"):
        model(image)
        assert mirage_kernels.release_workspace() > 0
        model(image)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            model(image)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    assert faults < 10 * 200, "of 4 KiB: half of one feature map of 48 channels, where two passes have seventy"


UNDER_A_LIMIT = """
import resource
import torch
import mirage_kernels

torch.set_num_threads(1)  # each thread's stack counts too
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (room << 20),) * 2)
with mirage_kernels.use("cpp"):
    y = mirage_kernels.channel_layer_norm(torch.ones(1, 48, 64, 64), torch.ones(48), torch.full((48,), 2.0))
assert y.eq(2).all()
torch.empty(room * 3 // 4 << 20, dtype=torch.uint8)
"""


@needs_cpp
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("room", [1024, 6144])
def test_the_workspace_leaves_the_addresses_of_a_limited_process_to_it(room, fresh):
    """``ulimit -v`` counts addresses, of which the workspace reserves many where there is no limit."""
    code = f"room = {room}\n{UNDER_A_LIMIT}"
    result = fresh.run(code)
    assert result.returncode == 0, result.stderr


@needs_cpp
def test_results_do_not_depend_on_what_the_workspace_held():
    torch.manual_seed(1)
    weights = [torch.randn(s) for s in ((24,), (24,), (96, 24, 1, 1), (96, 1, 3, 3), (24, 48, 1, 1))]
    x = torch.randn(1, 24, 40, 56, requires_grad=True)
    results = []
    for poison in (0.0, float("nan"), 1e30):
        mirage_kernels.release_workspace()
        # Runs of the same kernels on values of that kind leave them in the buffers that the next run takes.
        with torch.no_grad():
            mirage_kernels.feed_forward_stage(torch.full((1, 24, 40, 56), poison), *weights)
        filled = torch.full((1, 24, 40, 56), poison, requires_grad=True)
        mirage_kernels.feed_forward_stage(filled, *weights).sum().backward()
        y = mirage_kernels.feed_forward_stage(x, *weights)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), x)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.fixture
def roomy():
    """A workspace of 1 GiB, empty before and after, and the C++ library."""
    mirage_kernels.release_workspace()
    before = mirage_kernels.limit_workspace(1 << 30)
    with mirage_kernels.use("cpp"):
        yield
    mirage_kernels.limit_workspace(before)
    mirage_kernels.release_workspace()


def convolved(size: int = 512) -> torch.Tensor:
    """A result of 8 MiB for 512."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.rand(1, 3, size, size, generator=generator), torch.rand(8, 3, 3, 3, generator=generator)
    with torch.no_grad():
        return mirage_kernels.dense_conv2d(x, weight)


@needs_cpp
def test_large_results_come_from_the_workspace_and_go_back(roomy):
    first = convolved()
    at, values = first.data_ptr(), first.clone()
    view = first[0, 0]
    del first
    assert convolved().data_ptr() != at, "a view keeps the memory"
    del view
    again = convolved()
    assert again.data_ptr() == at, "the memory is taken again"
    assert torch.equal(again, values) and again.is_contiguous()
    del again
    assert mirage_kernels.release_workspace() >= 2 * values.nbytes


@needs_cpp
def test_results_are_tensors_like_any_other(roomy):
    y = convolved()
    kept = y.clone()
    y.mul_(2)
    assert torch.equal(y, 2 * kept)
    assert torch.equal(torch.from_numpy(y.numpy()), y)
    y.requires_grad_().sum().backward()
    assert torch.equal(y.grad, torch.ones_like(y))
    copied = pickle.loads(pickle.dumps(y))
    assert torch.equal(copied, y)


@needs_cpp
def test_results_may_die_on_other_threads(roomy):
    with ThreadPoolExecutor(4) as threads:
        sums = [future.result().item() for future in [threads.submit(lambda: convolved().sum()) for _ in range(16)]]
    assert len(set(sums)) == 1
    assert mirage_kernels.release_workspace() <= 1 << 30


@needs_cpp
def test_the_limit_holds():
    before = mirage_kernels.limit_workspace(20 << 20)
    try:
        with mirage_kernels.use("cpp"):
            results = [convolved() for _ in range(4)]
        del results
        assert 16 << 20 <= mirage_kernels.release_workspace() <= 20 << 20
        assert mirage_kernels.limit_workspace(0) == 20 << 20
        with mirage_kernels.use("cpp"):
            convolved()
        assert mirage_kernels.release_workspace() == 0
    finally:
        mirage_kernels.limit_workspace(before)
    assert before == LIMIT


def test_limits_that_are_none():
    with pytest.raises(ValueError, match="limit: expected a number of bytes from 0 on, got -1"):
        mirage_kernels.limit_workspace(-1)
    for limit in (1.5, True, "1"):
        with pytest.raises(TypeError, match="limit: expected a number of bytes, got"):
            mirage_kernels.limit_workspace(limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32], ids=str)
@pytest.mark.parametrize("shapes", [((2, 3, 5, 7), (2, 4, 5, 7)), ((1, 8, 512, 513), (1, 3, 512, 513))], ids=str)
def test_concatenate(shapes, dtype):
    first, second = ((100 * torch.rand(shape)).to(dtype) for shape in shapes)
    expected = torch.cat((first, second), 1)
    joined = workspace.concatenate(first.requires_grad_(dtype.is_floating_point), second)
    assert torch.equal(joined, expected) and joined.dtype == dtype
    assert joined.requires_grad == dtype.is_floating_point
    with torch.inference_mode():
        assert torch.equal(workspace.concatenate(first, second), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 3, 256, 257), (0, 3, 8, 8)], ids=str)
def test_add(shape, dtype):
    first, second = ((100 * torch.rand(shape)).to(dtype) for _ in range(2))
    expected = first + second
    total = workspace.add(first.requires_grad_(dtype.is_floating_point), second)
    assert torch.equal(total, expected) and total.dtype == dtype
    assert total.requires_grad == dtype.is_floating_point
    with torch.inference_mode():
        assert torch.equal(workspace.add(first, second.transpose(2, 3).clone().transpose(2, 3)), expected)


def test_add_is_what_torch_makes_of_other_operands():
    image = torch.rand(1, 3, 256, 256)
    half = workspace.add(image.bfloat16(), image)
    assert half.dtype == torch.float32 and torch.equal(half, image.bfloat16() + image)
    assert torch.equal(workspace.add(image, torch.ones(1, 3, 1, 1)), image + 1)
    with pytest.raises(RuntimeError, match="must match the size"):
        workspace.add(image, image[..., :-1])


def test_concatenate_is_as_strict_as_torch():
    with pytest.raises(RuntimeError, match="Sizes of tensors must match except in dimension 1"):
        workspace.concatenate(torch.rand(1, 8, 512, 512), torch.rand(1, 8, 512, 511))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32], ids=str)
@pytest.mark.parametrize("shape", [(2, 12, 5, 7), (1, 8, 128, 130), (0, 4, 2, 2)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_pixel_shuffles(shape, dtype, layout):
    x = (100 * torch.rand(shape)).to(dtype).contiguous(memory_format=layout)
    expected = torch.nn.functional.pixel_shuffle(x, 2)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = workspace.pixel_shuffle(x, 2)
            back = workspace.pixel_unshuffle(y, 2)
        for found, right in ((y, expected), (back, x)):
            assert torch.equal(found, right) and found.dtype == dtype and not found.requires_grad
        assert y.stride() == expected.stride()
    y = workspace.pixel_shuffle(x.requires_grad_(dtype.is_floating_point), 2)
    assert y.requires_grad == dtype.is_floating_point


def test_pixel_shuffles_by_three_and_of_images_without_a_batch():
    x = torch.rand(3, 18, 4, 5)
    assert torch.equal(workspace.pixel_shuffle(x, 3), torch.nn.functional.pixel_shuffle(x, 3))
    assert torch.equal(workspace.pixel_shuffle(x[0], 3), torch.nn.functional.pixel_shuffle(x[0], 3))
    x = torch.rand(3, 2, 6, 9)
    assert torch.equal(workspace.pixel_unshuffle(x, 3), torch.nn.functional.pixel_unshuffle(x, 3))
    assert torch.equal(workspace.pixel_unshuffle(x[0], 3), torch.nn.functional.pixel_unshuffle(x[0], 3))


def test_pixel_shuffles_are_as_strict_as_torch():
    with pytest.raises(RuntimeError, match="divisible by"):
        workspace.pixel_shuffle(torch.rand(1, 6, 4, 4), 2)
    with pytest.raises(RuntimeError, match="divisible by"):
        workspace.pixel_unshuffle(torch.rand(1, 6, 4, 5), 2)
    with pytest.raises(RuntimeError, match="positive"):
        workspace.pixel_shuffle(torch.rand(1, 6, 4, 4), 0)


@needs_cpp
@pytest.mark.parametrize("shuffle", [workspace.pixel_shuffle, workspace.pixel_unshuffle])
def test_pixel_shuffles_come_from_the_workspace(shuffle):
    mirage_kernels.release_workspace()
    y = shuffle(torch.rand(1, 16, 64, 64), 2)
    address = y.data_ptr()
    del y
    assert shuffle(torch.rand(1, 16, 64, 64), 2).data_ptr() == address
