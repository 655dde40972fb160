"""On a GPU: kernels run on the current stream of their tensors' GPU, whatever the current GPU is, and in graphs."""

import pytest
import torch
from harness import require
from test_transformer_blocks import several

import mirage_kernels
from mirage_kernels import BlockWeights, transformer_blocks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
SHAPE = (1, 24, 40, 56, 2)


@pytest.fixture(params=["triton", "cuda"], autouse=True)
def impl(request):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    require(request.param)
    with mirage_kernels.use(request.param), torch.no_grad():
        yield request.param


def arguments(device):
    """x and two blocks on a GPU."""
    x, blocks = several(SHAPE, 2)
    moved = [BlockWeights(*(type(half)(*(w.to(device) for w in half)) for half in b[:2]), *b[2:]) for b in blocks]
    return x.to(device), moved


def test_the_current_stream():
    """What is written on another stream after a long wait there is seen, and nobody else waits."""
    x, blocks = arguments("cuda")
    expected = transformer_blocks(x, blocks)
    stream, late = torch.cuda.Stream(), torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(int(2e8))  # a tenth of a second
        late.copy_(x)
        value = transformer_blocks(late, blocks)
    torch.cuda.current_stream().synchronize()
    assert not stream.query()
    stream.synchronize()
    assert torch.equal(value, expected)


def test_a_graph():
    x, blocks = arguments("cuda")
    expected, other = (transformer_blocks(t, blocks) for t in (x, 2 * x))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = transformer_blocks(x, blocks)
    for image, exact in ((x.clone(), expected), (2 * x, other)):
        x.copy_(image)
        graph.replay()
        assert torch.equal(value, exact)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_gpu_that_is_not_the_current_one():
    x, blocks = arguments("cuda:0")
    expected = transformer_blocks(x, blocks)
    assert torch.cuda.current_device() == 0
    value = transformer_blocks(*arguments("cuda:1"))
    assert value.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    if torch.cuda.get_device_name(0) == torch.cuda.get_device_name(1):
        assert torch.equal(value.cpu(), expected.cpu())
