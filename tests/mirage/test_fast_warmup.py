"""mirage.fast.warmup: every shape is run, and nothing of the model is changed."""

import pytest
import torch
from lookalike import ReleasedStyleMIRAGE
from torch import nn

import mirage
import mirage.fast


@pytest.fixture
def model():
    torch.manual_seed(0)
    return mirage.fast.mirage_tiny(num_blocks=(1, 1, 1, 1), num_refinement_blocks=1)


def state_of(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("training", [False, True])
def test_each_shape_is_run_and_nothing_changes(model, training):
    model.train(training)
    shapes, seen, backward = [(1, 3, 16, 24), (2, 3, 8, 8)], [], []
    model.register_forward_pre_hook(lambda module, inputs: seen.append((inputs[0].shape, torch.is_grad_enabled())))
    next(model.parameters()).register_hook(lambda grad: backward.append(1))
    before, random = state_of(model), torch.get_rng_state()
    mirage.fast.warmup(model, shapes)
    assert seen == [(torch.Size(shape), training) for shape in shapes] and len(backward) == (2 if training else 0)
    after = state_of(model)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None for p in model.parameters()) and model.training is training
    assert torch.equal(torch.get_rng_state(), random)


def test_a_model_that_returns_an_image_and_a_loss():
    model = mirage.fast.accelerate(ReleasedStyleMIRAGE()).train()
    backward = {name: [] for name in ("output.weight", "reduce_latent.weight")}  # before the image, before the loss
    for name, calls in backward.items():
        model.get_parameter(name).register_hook(lambda grad, calls=calls: calls.append(grad.shape))
    before = state_of(model)
    mirage.fast.warmup(model, [(2, 3, 8, 8)])
    assert all(calls == [model.get_parameter(name).shape] for name, calls in backward.items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    mirage.fast.warmup(model.eval(), [(2, 3, 8, 8)])


def test_images_are_of_the_model_s_dtype():
    seen = []
    model = nn.Sequential(nn.Conv2d(3, 3, 1)).to(torch.bfloat16).eval()
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    mirage.fast.warmup(model, [[1, 3, 4, 4]])
    assert seen == [torch.bfloat16]


def test_frozen_weights_in_training_mode(model):
    model.requires_grad_(False).train()
    mirage.fast.warmup(model, [(2, 3, 8, 8)])


def test_errors_name_the_argument(model):
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got str"):
        mirage.fast.warmup("model", [(1, 3, 8, 8)])
    with pytest.raises(ValueError, match="shapes: expected at least one"):
        mirage.fast.warmup(model, [])
    for wrong in ((3, 8, 8), (1, 3, 0, 8), (1, 3, 8.0, 8)):
        with pytest.raises(ValueError, match=r"shapes: expected four positive numbers \[B, C, H, W\], got \["):
            mirage.fast.warmup(model, [(1, 3, 8, 8), wrong])
    with pytest.raises(ValueError, match="model: expected floating-point parameters on one device, got none"):
        mirage.fast.warmup(nn.ReLU(), [(1, 3, 8, 8)])
    with pytest.raises(ValueError, match="multiples of 8"):
        mirage.fast.warmup(model, [(1, 3, 9, 8)])
