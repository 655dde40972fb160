"""mirage.fast.cuda_graph: when a graph is captured anew, and on a GPU that it computes what the model does."""

import pytest
import torch
from torch import nn

import mirage
import mirage.fast
from mirage.fast.cuda_graph import GraphedModel

ON_GPU = torch.cuda.is_available()


class Recorded(GraphedModel):
    """On a CPU: a capture remembers the values of the weights at the addresses it saw; a replay runs the model."""

    captures = 0

    def _record(self):
        self.captures += 1
        self._result = torch.empty(self._image.shape)
        self.replays = 0

    def _replay(self):
        self.replays += 1
        with torch.no_grad():
            self._result.copy_(self.model(self._image))


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval()


IMAGE = torch.rand(2, 3, 4, 5)


def test_weights_that_change_in_place_need_no_new_capture():
    model = small()
    run = Recorded(model, IMAGE)
    first = run(IMAGE)
    with torch.no_grad():
        model[0].weight.mul_(2)
        model[1].running_mean.add_(1)
    model.load_state_dict(small().state_dict())
    assert torch.equal(run(IMAGE), first) and (run.captures, run.replays) == (1, 2)
    assert run(IMAGE).data_ptr() != run(IMAGE).data_ptr()


def test_every_tensor_of_a_result_is_a_copy():
    """The released code's network returns an image and a loss."""

    class Tuple(nn.Module):
        def forward(self, x):
            return x + 1, {"loss": x.mean(), "name": "a"}

    class Twice(Recorded):
        def _record(self):
            self._result = self.model(self._image)

        def _replay(self):
            self._result[0].copy_(self._image + 1)
            self._result[1]["loss"].copy_(self._image.mean())

    run = Twice(Tuple().eval(), IMAGE)
    first, second = run(IMAGE), run(2 * IMAGE)
    assert torch.equal(first[0], IMAGE + 1) and torch.equal(first[1]["loss"], IMAGE.mean())
    assert torch.equal(second[0], 2 * IMAGE + 1) and second[1]["name"] == "a"


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}, assign=True),
        lambda model: setattr(model[0], "weight", nn.Parameter(model[0].weight + 1)),
        lambda model: setattr(model[0].weight, "data", model[0].weight.data + 1),
        lambda model: setattr(model[1], "running_var", model[1].running_var + 1),
        lambda model: model.append(nn.Conv2d(3, 3, 1)),
    ],
)
def test_other_tensors_are_captured_again(change):
    model = small()
    run = Recorded(model, IMAGE)
    run(IMAGE)
    kept = [t.data_ptr() for t in run._kept]
    change(model)
    with torch.no_grad():
        expected = model(IMAGE)
    assert torch.equal(run(IMAGE), expected) and run.captures == 2
    assert torch.equal(run(IMAGE), expected) and run.captures == 2
    assert kept != [t.data_ptr() for t in run._kept]


def test_autocast_is_captured_again():
    run = Recorded(small(), IMAGE)
    with torch.autocast("cuda", torch.bfloat16, enabled=True) if ON_GPU else torch.autocast("cpu", torch.bfloat16):
        run(IMAGE)
    assert run.captures == (2 if ON_GPU else 1)


def test_errors_name_the_argument():
    model, run = small(), Recorded(small(), IMAGE)
    with pytest.raises(ValueError, match=r"image: expected shape \[2, 3, 4, 5\] as in the example, got \[3, 4, 5\]"):
        run(IMAGE[0])
    with pytest.raises(ValueError, match="image: expected dtype torch.float32 as in the example, got torch.float64"):
        run(IMAGE.double())
    with pytest.raises(ValueError, match="image: expected device cpu as in the example, got meta"):
        run(IMAGE.to("meta"))
    with pytest.raises(TypeError, match="image: expected a tensor, got list"):
        run([IMAGE])
    run.model.train()
    with pytest.raises(ValueError, match="model: expected eval mode, got training mode"):
        run(IMAGE)
    with pytest.raises(ValueError, match="model: expected eval mode, got training mode"):
        Recorded(small().train(), IMAGE)
    with pytest.raises(ValueError, match="model: expected weights on cpu like the example, got some on meta"):
        Recorded(small().to("meta"), IMAGE)
    with pytest.raises(ValueError, match="example: expected a tensor on a CUDA device, got cpu"):
        mirage.fast.cuda_graph(model, IMAGE)
    with pytest.raises(TypeError, match="example: expected a tensor, got tuple"):
        mirage.fast.cuda_graph(model, (1, 3, 8, 8))
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got function"):
        mirage.fast.cuda_graph(lambda x: x, IMAGE)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_graph_on_the_gpu(dtype):
    torch.manual_seed(0)
    model = mirage.fast.mirage_tiny().eval().to("cuda", dtype)
    images = torch.rand(3, 1, 3, 64, 96, device="cuda", dtype=dtype)
    run = mirage.fast.cuda_graph(model, images[0])
    with torch.no_grad():
        results = [run(image) for image in images]
        assert all(torch.equal(a, model(b)) for a, b in zip(results, images, strict=True))
        for parameter in model.parameters():
            parameter.mul_(0.9)
        assert torch.equal(run(images[0]), model(images[0])) and not torch.equal(run(images[0]), results[0])
        model.load_state_dict({k: v * 0.9 for k, v in model.state_dict().items()}, assign=True)
        torch.cuda.empty_cache()
        assert torch.equal(run(images[1]), model(images[1]))
