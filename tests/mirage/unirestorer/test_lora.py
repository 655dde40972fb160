"""LoRA of convolutions: what the released code computes, fresh adapters, folding, numbers of parameters."""

import copy
import json
import warnings
from functools import cache

import golden
import numpy as np
import pytest
import torch
from golden import regenerate, relative_error
from torch import nn

import mirage
from mirage import networks
from mirage.unirestorer import (
    LoRAConv,
    add_lora,
    fold,
    lora_parameters,
    lora_settings,
    remove_lora,
    unfold,
)
from mirage.unirestorer.lora import adapters

CASE = "unirestorer_lora_restormer"


def small_restormer(**options):
    sizes = {"dim": 8, "num_blocks": [1, 1, 1, 1], "num_refinement_blocks": 1, "heads": [1, 1, 2, 2]}
    return networks.create("restormer", **{**sizes, **options})


def small_nafnet():
    network = networks.create("nafnet", width=4, encoder_blocks=[1, 1], middle_blocks=1, decoder_blocks=[1, 1])
    return shaken(network)


def shaken(network):
    """Every weight off its initial value, running statistics too; in evaluation mode."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in network.state_dict().values():
            if value.is_floating_point():
                value.add_(0.1 * torch.rand(value.shape, generator=generator))
    return network.eval()


def trained(network):
    """As if its adapters, and the norms that have gradients, had been trained."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in lora_parameters(network):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return network


NETWORKS = {
    "restormer": lambda: shaken(small_restormer(bias=True)),
    "nafnet": small_nafnet,
    "mirage": lambda: shaken(golden.mirage_mini()),
}
everywhere = pytest.mark.parametrize("kind", NETWORKS)
PICTURE = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def run(network, x=PICTURE):
    return network(x)


def bits(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


# --- what the released code computes


@cache
def description():
    with open(golden.golden_file(f"{CASE}_state_dict.json")) as file:
        return json.load(file)


@cache
def expected():
    with np.load(golden.golden_file(f"{CASE}.npz")) as data:
        return {key: torch.from_numpy(np.asarray(data[key])) for key in data.files}


def released(without_b=False):
    """The case's network in fp64, under the released names."""
    arguments = dict(description()["constructor"])
    ranks, alphas = set(arguments.pop("r")), set(arguments.pop("lora_alpha"))
    network = add_lora(networks.create("restormer", **arguments), ranks.pop(), alphas.pop())
    state = {name: regenerate(name, tuple(shape)) for name, shape in description()["parameters"].items()}
    if without_b:
        state.update({name: torch.zeros_like(value) for name, value in state.items() if name.endswith(".lora_B")})
    network.load_state_dict(state, strict=True)
    return network.double()


def test_names_and_shapes_are_the_released_ones():
    shapes = {name: list(parameter.shape) for name, parameter in released().named_parameters()}
    assert shapes == description()["parameters"]


@pytest.mark.parametrize("odd", ["", "odd."])
def test_outputs_are_the_released_ones_folded_and_unfolded(odd):
    network, data = released().train(), expected()
    picture = data[f"{odd}input"].double()
    assert relative_error(run(network, picture), data[f"{odd}unfolded.restored"]) <= 1e-10
    assert relative_error(run(fold(network).eval(), picture), data[f"{odd}folded.restored"]) <= 1e-10


def test_the_base_is_the_released_one():
    network, data = released(without_b=True), expected()
    assert relative_error(run(network.eval(), data["input"].double()), data["base.restored"]) <= 1e-10
    assert relative_error(run(fold(network), data["input"].double()), data["base.restored"]) <= 1e-10


def test_folded_weights_are_the_released_ones():
    network, data = fold(released()), expected()
    weights = dict(network.named_parameters())
    names = [key.removeprefix("folded.weight_norm.") for key in data if key.startswith("folded.weight_norm.")]
    assert len(names) > 40
    for name in names:
        weight, norm = weights[name.replace(".conv.weight", ".weight")], data[f"folded.weight_norm.{name}"]
        direction = torch.from_numpy(golden.noise_of("grad." + name, tuple(weight.shape)))
        assert abs(weight.norm() - norm) <= 1e-10 * norm, name
        assert abs((weight * direction).sum() - data[f"folded.weight_dot.{name}"]) <= 1e-10 * norm, name


def test_gradients_are_the_released_ones():
    network, data = released().train(), expected()
    loss = (network(data["input"].double()) - data["target"].double()).abs().mean()
    loss.backward()
    assert abs(loss.item() - data["train.l1"]) <= 1e-10 * data["train.l1"]
    compared = 0
    for name, parameter in network.named_parameters():
        if name.endswith(".conv.weight"):
            assert parameter.grad is None and not parameter.requires_grad
            continue
        norm, dot = data[f"train.grad_norm.{name}"].item(), data[f"train.grad_dot.{name}"].item()
        direction = torch.from_numpy(np.asarray(golden.noise_of("grad." + name, tuple(parameter.shape))))
        assert abs(parameter.grad.norm().item() - norm) <= 1e-8 * norm, name
        assert abs((parameter.grad * direction).sum().item() - dot) <= 1e-8 * norm, name
        compared += 1
    assert compared == len(list(lora_parameters(network)))


# --- numbers of parameters


def count(parameters):
    return sum(parameter.numel() for parameter in parameters)


@pytest.mark.parametrize(("norm", "whole"), [("WithBias", 26_126_644), ("BiasFree", 26_111_668)])
def test_parameters_of_the_published_restormer(norm, whole):
    with torch.device("meta"):
        network = networks.create("restormer", norm=norm)
        convolutions = count(m.weight for m in network.modules() if isinstance(m, nn.Conv2d))
        add_lora(network)
    assert count(network.parameters()) == whole + 5_644_656
    assert convolutions == 26_096_544
    own = count(lora_parameters(network))
    assert own == 5_644_656 + whole - 26_096_544
    if norm == "WithBias":
        assert own - 5_644_656 == 30_100
        assert 26_126_644 + 26 * 5_644_656 == 172_887_700 and count(network.parameters()) == 31_771_300


@pytest.mark.parametrize("rank", [1, 3, 16])
def test_parameters_grow_with_the_rank(rank):
    with torch.device("meta"):
        network = add_lora(networks.create("restormer"), rank, norms=False)
    assert count(lora_parameters(network)) == 705_582 * rank


def test_every_convolution_is_adapted_and_nothing_else():
    network = golden.mirage_mini()
    convolutions = [name for name, m in network.named_modules() if isinstance(m, nn.Conv1d | nn.Conv2d)]
    add_lora(network, 2)
    assert [name for name, _ in adapters(network)] == convolutions
    assert "latent.0.attn.gatedcnn.kernel_generator.3" in convolutions
    assert "latent.0.attn.mlp.0" in convolutions and "latent.0.attn.qkv_dwconv" in convolutions
    assert isinstance(network.spd_proj_shallow, nn.Linear) and not network.spd_proj_shallow.weight.requires_grad


@pytest.mark.parametrize(
    ("conv", "a", "b"),
    [
        (nn.Conv2d(6, 10, 3), (9, 18), (30, 9)),
        (nn.Conv2d(6, 6, 5, groups=6), (15, 30), (5, 15)),
        (nn.Conv2d(6, 4, 3, groups=2), (9, 18), (6, 9)),
        (nn.Conv2d(6, 4, (1, 3)), (3, 18), (4, 3)),
        (nn.Conv2d(6, 4, (3, 1)), (9, 6), (12, 9)),
        (nn.Conv1d(6, 4, 3), (9, 6), (12, 9)),
        (nn.Conv3d(6, 4, 3), (9, 54), (12, 9)),
    ],
)
def test_shapes_of_the_adapters(conv, a, b):
    network = add_lora(nn.Sequential(conv), 3)
    (adapter,) = network
    assert tuple(adapter.lora_A.shape) == a and tuple(adapter.lora_B.shape) == b
    assert not adapter.lora_B.any() and adapter.lora_A.std() > 0.01
    x = torch.rand(2, 6, *[7] * (conv.weight.ndim - 2))
    before = conv(x)
    assert torch.equal(network(x), before)
    trained(network)
    delta = 16 / 3 * (adapter.lora_B @ adapter.lora_A).reshape(conv.weight.shape)
    assert torch.allclose(network(x), conv._conv_forward(x, conv.weight + delta, conv.bias), atol=1e-6)
    assert not torch.equal(network(x), before)


# --- fresh, folded, unfolded


@everywhere
def test_a_fresh_adapter_changes_no_bit(kind):
    network = NETWORKS[kind]()
    before, state = run(network), bits(network)
    add_lora(network, 4)
    assert torch.equal(run(network), before)
    assert torch.equal(run(fold(network)), before)
    assert same(bits(remove_lora(network)), state)
    assert torch.equal(run(network), before)
    assert all(parameter.requires_grad for parameter in network.parameters())


@everywhere
def test_folding_gives_what_unfolded_gives_and_unfolding_the_base(kind):
    network = NETWORKS[kind]()
    before, state = run(network), bits(network)
    trained(add_lora(network, 4))
    adapted, expert = run(network), bits(network)
    assert not torch.equal(adapted, before)
    fold(network)
    assert bits(network).keys() == state.keys()
    assert torch.equal(run(network), adapted)
    assert not any(isinstance(module, LoRAConv) for module in network.modules())
    fold(network)
    assert torch.equal(run(network), adapted)
    unfold(network)
    assert same(bits(network), expert) and torch.equal(run(network), adapted)
    assert same(bits(remove_lora(network)), state) and torch.equal(run(network), before)


@everywhere
def test_training_leaves_the_base_alone(kind):
    network = add_lora(NETWORKS[kind]().train(), 2)
    before = bits(network)
    optimizer = torch.optim.SGD(lora_parameters(network), lr=0.1)
    for _ in range(2):  # the gradient of A is 0 while B is
        optimizer.zero_grad()
        network(PICTURE).square().mean().backward()
        optimizer.step()
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert not changed & frozen
    assert {f"{name}.lora_A" for name, _ in adapters(network) if not name.startswith("reduce_")} <= changed
    norm = {
        "restormer": "latent.0.norm1.body.bias",
        "nafnet": "middle_blks.0.beta",
        "mirage": "latent.0.norm1.body.bias",
    }
    assert norm[kind] in changed


def test_norms_stay_the_bases_when_asked():
    network = add_lora(NETWORKS["mirage"](), 2, norms=False)
    assert {name.rsplit(".", 1)[1] for name, p in network.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert lora_settings(network).norms is False


def test_running_statistics_come_back_with_the_base():
    network = NETWORKS["mirage"]()
    before = bits(network)
    trained(add_lora(network, 2))
    network.train()(PICTURE)
    mean = "latent.0.attn.gatedcnn.norm.running_mean"
    assert not torch.equal(network.state_dict()[mean], before[mean])
    assert same(bits(remove_lora(network)), before)


def test_folding_follows_conversions_and_modes():
    network = trained(add_lora(NETWORKS["restormer"](), 2))
    weights = [p.clone() for p in network.parameters()]
    fold(network).double().train()
    unfold(network)
    assert all(p.dtype == torch.float64 for p in network.parameters())
    assert all(adapter.training for _, adapter in adapters(network))
    assert all(torch.equal(p.float(), w) for p, w in zip(network.parameters(), weights, strict=True))


def test_copies_fold_by_themselves():
    network = trained(add_lora(NETWORKS["restormer"](), 2))
    adapted = run(network)
    for state in (network, fold(network)):
        other = copy.deepcopy(state)
        unfold(other)
        assert torch.equal(run(other), adapted)
        with torch.no_grad():
            next(iter(lora_parameters(other))).add_(1.0)
        assert not torch.equal(run(other), adapted) and torch.equal(run(state), adapted)


def test_autocast_sums_in_full_precision():
    network = trained(add_lora(NETWORKS["restormer"](), 2))
    with torch.autocast("cpu", torch.bfloat16):
        inside = [adapter.weight for _, adapter in adapters(network)]
    assert all(torch.equal(w, adapter.weight) for w, (_, adapter) in zip(inside, adapters(network), strict=True))


def test_one_convolution_in_two_places_has_one_adapter():
    conv = nn.Conv2d(3, 3, 1)
    network = add_lora(nn.Sequential(conv, nn.Sequential(conv)), 2)
    assert network[0] is network[1][0] and len(adapters(network)) == 1
    remove_lora(network)
    assert network[0] is conv and network[1][0] is conv


# --- mirage.fast


def test_a_folded_network_runs_on_the_fast_modules_as_one_without_lora_does():
    network = trained(add_lora(golden.load_golden_weights(golden.mirage_mini()).eval(), 4))
    expected = run(network)
    plain = golden.mirage_mini().eval()
    plain.load_state_dict(fold(network).state_dict())
    fast, reference = mirage.fast.accelerate(network), mirage.fast.accelerate(plain)
    assert str(mirage.fast.summary(fast)) == str(mirage.fast.summary(reference))
    assert not mirage.fast.summary(fast).called and not mirage.fast.summary(fast).kept
    assert torch.equal(run(fast), run(reference))
    assert relative_error(run(fast), expected) <= 1e-5


def test_a_fast_network_is_adapted_and_trains_and_runs_fast_once_folded():
    network = mirage.fast.accelerate(golden.load_golden_weights(golden.mirage_mini()).eval())
    before = run(network)
    add_lora(network, 2)
    assert "LoRAConv" in next(iter(mirage.fast.summary(network).called.values()))
    assert relative_error(run(network), before) <= 1e-5
    assert torch.equal(run(fold(network)), before)
    unfold(network).train()(PICTURE).mean().backward()
    assert all(p.grad is not None for n, p in network.named_parameters() if p.requires_grad and "reduce_" not in n)
    trained(network.eval())
    adapted = run(network)
    assert relative_error(run(fold(network)), adapted) <= 1e-5 and not mirage.fast.summary(network).called
    assert torch.equal(run(remove_lora(network)), before)
    mirage.fast.revert(network)
    assert not any(type(m).__module__.startswith("mirage.fast") for m in network.modules())


def test_what_was_accelerated_while_adapted_is_again_once_folded():
    network = add_lora(golden.load_golden_weights(golden.mirage_mini()).eval(), 2)
    before = run(network)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mirage.fast.accelerate(network)
    assert relative_error(run(network), before) <= 1e-5
    mirage.fast.accelerate(fold(network))
    assert not mirage.fast.summary(network).kept and not mirage.fast.summary(network).called
    assert relative_error(run(network), before) <= 1e-5


def test_a_folded_network_is_saved_as_one_of_its_own(tmp_path):
    network = trained(add_lora(NETWORKS["restormer"](), 2))
    with pytest.raises(ValueError, match="not those of restormer"):
        networks.save(network, tmp_path / "whole.safetensors")
    adapted = run(network)
    networks.save(fold(network), tmp_path / "whole.safetensors")
    assert torch.equal(run(networks.load(tmp_path / "whole.safetensors")), adapted)


# --- bad input


class Weighted(nn.Conv2d):
    def forward(self, x):
        return super().forward(2 * x)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Sequential(nn.Linear(3, 3)), "Sequential has none"),
        (nn.Conv2d(3, 3, 1), "got a Conv2d itself"),
        (nn.Sequential(nn.Conv2d(3, 3, 1), nn.ConvTranspose2d(3, 3, 2)), "1 cannot be adapted: it is transposed"),
        (nn.Sequential(Weighted(3, 3, 1)), "0 cannot be adapted: its class Weighted has a forward of its own"),
        (
            nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1))),
            "0 cannot be adapted: it is parametrized",
        ),
    ],
)
def test_networks_that_cannot_be_adapted_are_refused_and_left_alone(network, message):
    before = [type(module) for module in network.modules()]
    with pytest.raises(ValueError, match=message):
        add_lora(network)
    assert [type(module) for module in network.modules()] == before
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_convolutions_with_hooks_are_refused_and_may_be_left_out():
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(nn.Conv2d(3, 3, 1)), nn.Conv2d(3, 3, 1))
    network[1][0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"1\.0 cannot be adapted: it has hooks; leave it out with exclude"):
        add_lora(network)
    add_lora(network, exclude=("1",))
    assert [name for name, _ in adapters(network)] == ["0", "2"] and not network[1][0].weight.requires_grad


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank: expected an integer of at least 1, got 0"),
        ({"rank": 2.0}, "rank: expected an integer of at least 1, got 2.0"),
        ({"rank": True}, "rank: expected an integer"),
        ({"alpha": float("nan")}, "alpha: expected a finite number, got nan"),
        ({"alpha": "16"}, "alpha: expected a finite number, got '16'"),
    ],
)
def test_settings_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        add_lora(nn.Sequential(nn.Conv2d(3, 3, 1)), **arguments)


def test_lora_that_is_not_there_or_is_there_already():
    network = nn.Sequential(nn.Conv2d(3, 3, 1))
    for function in (fold, unfold, remove_lora, lora_settings, lora_parameters):
        with pytest.raises(ValueError, match="it has no LoRA; add_lora gives it some"):
            function(network)
    add_lora(network)
    with pytest.raises(ValueError, match="it has LoRA already"):
        add_lora(network)
    with pytest.raises(ValueError, match="it is folded; unfold it before training"):
        lora_parameters(fold(network))
    with pytest.raises(ValueError, match="it has LoRA already"):
        add_lora(network)
    with pytest.raises(TypeError, match="expected a torch.nn.Module, got str"):
        add_lora("restormer")
