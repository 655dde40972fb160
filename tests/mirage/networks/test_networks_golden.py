"""Restormer and PromptIR against what the published code computes: outputs, features and gradients, fp64 and fp32.

The limits are those of the golden folder's README: ten times closer in fp64 than anything but equality would be, and in
fp32 what the published code itself is away from its fp64, and some more.
"""

import json
from functools import cache

import golden
import numpy as np
import pytest
import torch
from golden import regenerate, relative_error

from mirage import networks
from mirage.complexity import measure

CASES = {
    "restormer_withbias": "restormer",
    "restormer_biasfree": "restormer",
    "restormer_convbias": "restormer",
    "promptir": "promptir",
}
OUTPUTS = {torch.float64: 1e-10, torch.float32: 5e-6}
FEATURES = {torch.float64: 1e-10, torch.float32: 1e-5}
INPUT_GRADIENT = {torch.float64: 1e-8, torch.float32: 5e-5}
GRADIENTS = {torch.float64: 1e-8, torch.float32: 5e-5}
FEW = 8  # elements: sums that cancel
FEW_GRADIENTS = {torch.float64: 1e-8, torch.float32: 5e-4}
FLOOR = 1e-4  # of the file's largest gradient norm
UNUSED = ("chnl_reduce", "reduce_noise_channel_")
PROMPTS = ("prompt1.prompt_param", "prompt2.prompt_param", "prompt3.prompt_param")

dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
cases = pytest.mark.parametrize("case", CASES)


@cache
def description(case):
    with open(golden.golden_file(f"{case}_state_dict.json")) as file:
        return json.load(file)


@cache
def expected(case):
    with np.load(golden.golden_file(f"{case}.npz")) as data:
        return {key: torch.from_numpy(np.asarray(data[key])) for key in data.files}


def network_of(case, dtype):
    network = networks.create(CASES[case], **description(case)["constructor"])
    state = {k: regenerate(k, tuple(v)) for k, v in description(case)["parameters"].items()}
    network.load_state_dict(state, strict=True)
    return network.to(dtype)


def direction(name, shape):
    return torch.from_numpy(np.asarray(golden.noise_of("grad." + name, tuple(shape))))


@cases
def test_names_and_shapes_are_the_published_ones(case):
    with torch.device("meta"):
        network = networks.create(CASES[case], **description(case)["constructor"])
    shapes = {name: list(p.shape) for name, p in network.named_parameters()}
    assert shapes == description(case)["parameters"]
    assert not description(case)["buffers"] and network.state_dict().keys() == shapes.keys()


@dtypes
@cases
def test_output_and_features(case, dtype):
    network, data = network_of(case, dtype).eval(), expected(case)
    features = {}
    named = {key.split(".", 2)[2] for key in data if key.startswith("eval.feature_norm.")}
    for name in named:
        module = network.get_submodule(name)
        module.register_forward_hook(lambda _m, _i, out, name=name: features.__setitem__(name, out.detach()))
    with torch.no_grad():
        restored = network(data["input"].to(dtype))
    assert len(named) >= 9
    assert relative_error(restored, data["eval.restored"]) <= OUTPUTS[dtype]
    for name, value in features.items():
        norm, at = data[f"eval.feature_norm.{name}"], data[f"eval.feature_index.{name}"]
        assert abs(value.double().norm() - norm) <= FEATURES[dtype] * norm, name
        assert relative_error(value.flatten()[at], data[f"eval.feature_samples.{name}"]) <= FEATURES[dtype], name


@dtypes
@cases
def test_gradients(case, dtype):
    network, data = network_of(case, dtype).train(), expected(case)
    x = data["input"].to(dtype).requires_grad_()
    loss = (network(x) - data["target"].to(dtype)).abs().mean()
    loss.backward()
    assert abs(loss.item() - data["train.l1"]) <= OUTPUTS[dtype] * data["train.l1"]
    assert relative_error(x.grad, data["train.grad_input"]) <= INPUT_GRADIENT[dtype]
    largest = max(value.item() for key, value in data.items() if key.startswith("train.grad_norm."))
    for name, parameter in network.named_parameters():
        norm, dot = data[f"train.grad_norm.{name}"].item(), data[f"train.grad_dot.{name}"].item()
        if norm == 0:
            assert parameter.grad is None and name.startswith(UNUSED), name
            continue
        gradient = parameter.grad.double()
        limit = (FEW_GRADIENTS if parameter.numel() <= FEW else GRADIENTS)[dtype] * max(norm, FLOOR * largest)
        assert abs(gradient.norm().item() - norm) <= limit, name
        assert abs((gradient * direction(name, gradient.shape)).sum().item() - dot) <= limit, name


@dtypes
def test_prompts_of_unit_size_reach_the_output(dtype):
    network, data = network_of("promptir", dtype).eval(), expected("promptir")
    with torch.no_grad():
        for name in PROMPTS:
            parameter = network.get_parameter(name)
            noise = np.asarray(golden.noise_of(name, tuple(parameter.shape)), np.float32)
            parameter.copy_(torch.from_numpy(noise))
        restored = network(data["input"].to(dtype))
    assert relative_error(restored, data["unit_prompts.restored"]) <= OUTPUTS[dtype]
    assert relative_error(restored, data["eval.restored"]) > 1e-2  # the prompts matter here


@pytest.mark.parametrize(("side", "convolutions", "products"), [(256, 140.990, 13.892), (512, 563.962, 55.566)])
def test_multiply_adds_of_restormer(side, convolutions, products):
    """The paper prints 140.99 G at 256x256, which is convolutions alone: attention's two products come on top."""
    with torch.device("meta"):
        network, image = networks.create("restormer"), torch.empty(1, 3, side, side)
    counted = 0

    def count(module, arguments, output):
        nonlocal counted
        counted += output.numel() * module.weight[0].numel()

    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(count)
    network(image)
    assert counted / 1e9 == pytest.approx(convolutions, abs=5e-4)
    total = measure(networks.create("restormer"), (1, 3, side, side), memory="fake").macs
    assert (total - counted) / 1e9 == pytest.approx(products, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "arguments", "parameters"),
    [
        ("restormer", {}, 26_126_644),
        ("restormer", {"norm": "BiasFree"}, 26_111_668),
        ("promptir", {}, 35_592_263),
        ("nafnet", {}, 29_159_715),
        ("nafnet", {"width": 64}, 115_982_915),
    ],
)
def test_parameters_of_the_published_networks(name, arguments, parameters):
    with torch.device("meta"):
        network = networks.create(name, **arguments)
    assert sum(p.numel() for p in network.parameters()) == parameters
