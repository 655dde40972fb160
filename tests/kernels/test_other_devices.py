"""Operators on devices that no kernel is for: plain PyTorch, forward and backward. "meta" stands for all of them."""

import pytest
import torch

import mirage
import mirage.fast
import mirage_kernels


def tensor(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)


def mixer_weights(channels=12, heads=2, hidden=10):
    from mirage_kernels.mixer_stage.weights import shapes

    return mirage_kernels.MixerWeights(*(tensor(*shape) for shape in shapes(channels, heads, hidden).values()))


def feed_forward_weights(channels=12, hidden=16):
    from mirage_kernels.feed_forward_stage.weights import shapes

    return mirage_kernels.FeedForwardWeights(*(tensor(*shape) for shape in shapes(channels, hidden).values()))


def scaled_feed_forward():
    return mirage_kernels.ScaledFeedForward(feed_forward_weights(), 1e-5, tensor(1, 12, 1, 1))


def channel_attention_weights(channels=12, heads=3):
    from mirage_kernels.channel_attention_stage.weights import shapes

    return mirage_kernels.ChannelAttentionWeights(*(tensor(*shape) for shape in shapes(channels, heads).values()))


def block_weights():
    of_mirage = mirage_kernels.FeedForwardWeights(*feed_forward_weights()[:5])
    return mirage_kernels.BlockWeights(mixer_weights(), of_mirage, 1e-5, 1e-5, 1e-5)


def scalars():
    return [tensor(1) for _ in range(3)]


X = (2, 12, 8, 6)
CASES = {
    "channel_attention": (lambda x: [x, tensor(*X), tensor(*X), tensor(3, 1, 1), 3], X),
    "channel_attention_fusion": (
        lambda x: [x, tensor(*X), tensor(*X), tensor(3, 1, 1), 3, tensor(*X), tensor(*X), *scalars()],
        (2, 36, 8, 6),
    ),
    "channel_attention_stage": (lambda x: [x, channel_attention_weights()], X),
    "channel_layer_norm": (lambda x: [x, tensor(12), tensor(12)], X),
    "dense_conv2d": (lambda x: [x, tensor(5, 12, 3, 3)], (2, 5, 8, 6)),
    "dynamic_depthwise_conv2d": (lambda x: [x, tensor(2, 12, 7, 7)], X),
    "feed_forward_stage": (lambda x: [x, *feed_forward_weights()], X),
    "feed_forward_stages": (lambda x: [x, [scaled_feed_forward(), scaled_feed_forward()]], X),
    "gated_depthwise_ffn": (lambda x: [x, tensor(12, 1, 3, 3)], (2, 6, 8, 6)),
    "mixer_stage": (lambda x: [x, mixer_weights()], X),
    "spd_covariance": (lambda x: [x], (2, 12, 12)),
    "transformer_blocks": (lambda x: [x, [block_weights(), block_weights()]], X),
    "tri_branch_fusion": (lambda x: [x, tensor(*X), tensor(*X), *scalars()], (2, 36, 8, 6)),
}


def test_every_operator_has_a_case():
    public = {name: getattr(mirage_kernels, name) for name in mirage_kernels.__all__}
    functions = {name for name, value in public.items() if callable(value) and not isinstance(value, type)}
    helpers = {"available", "last_used", "limit_workspace", "release_workspace", "use", "why_not"}
    assert set(CASES) == functions - helpers


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", CASES)
def test_operators_run_as_pytorch(name, grad):
    arguments, shape = CASES[name]
    x = tensor(*X)
    with torch.set_grad_enabled(grad):
        y = getattr(mirage_kernels, name)(*arguments(x))
        y = y.y if name == "mixer_stage" else y
    assert y.device.type == "meta" and tuple(y.shape) == shape and y.dtype == x.dtype and y.requires_grad == grad
    assert mirage_kernels.last_used(name) == "torch"
    if grad:
        y.sum().backward()
        assert x.grad.shape == x.shape and x.grad.dtype == x.dtype and x.grad.device.type == "meta"


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("mixer_stage", "transformer_blocks")])
def test_a_forced_implementation_names_the_device(name):
    arguments, _ = CASES[name]
    if mirage_kernels.available()["cpp"] != "yes":
        pytest.skip(mirage_kernels.available()["cpp"])
    with mirage_kernels.use("cpp"), pytest.raises(RuntimeError, match="library runs on CPU tensors, not on meta"):
        getattr(mirage_kernels, name)(*arguments(tensor(*X)))


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_the_accelerated_network(train, grad):
    model = mirage.fast.accelerate(
        mirage.MIRAGE(dim=12, num_blocks=(1, 1, 1, 1), num_refinement_blocks=1, heads=(1, 1, 2, 2))
    )
    model = model.to("meta").train(train)
    x = torch.empty(2, 3, 32, 24, device="meta")
    with torch.set_grad_enabled(grad):
        y, embeddings = model(x, return_spd=True)
        assert y.shape == x.shape and y.device.type == "meta" and y.requires_grad == grad
        if grad:
            (y.sum() + sum(e.sum() for e in embeddings)).backward()
            assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
