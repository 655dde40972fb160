"""The router against values computed from the published description and by the released code, and what it promises."""

import json
from functools import cache

import golden
import numpy as np
import pytest
import torch
from golden import noise_of, regenerate, relative_error

from mirage.unirestorer import (
    ExpertModules,
    Router,
    RouterLoss,
    balance_loss,
    centre_loss,
    cv_squared,
    dispatch,
    straight_through,
)

NODES = [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 4, 4, 4, 4, 5, 5, 6, 6, 7, 7]
PATHS = [[0, node, 8 + leaf] for leaf, node in enumerate(NODES)]
"""The released tree: root 0, nodes 1 to 7, leaves 8 to 29."""

LEAVES = [19, 19, 19, 6, 19, 7, 13, 19]
LEVELS = [0, 2, 0, 1, 0, 0, 0, 0]
EXPERTS = [0, 27, 0, 3, 0, 0, 0, 0]
P_LEAF = [0.13608619, 0.15438723, 0.23905445, 0.11071930, 0.23043890, 0.11714762, 0.11355366, 0.15918993]
P_LEVEL = [0.76730131, 0.48114951, 0.52455242, 0.38499622, 0.52327208, 0.68562437, 0.77541374, 0.39102126]


def embeddings():
    drawn = np.random.RandomState(5).standard_normal((8, 512))
    return torch.from_numpy(3 * drawn.astype(np.float32).astype(np.float64))


def released(dtype=torch.float64, **arguments):
    """A router whose weights are those that their names stand for."""
    router = Router(PATHS, **arguments)
    names = [name for name in router.state_dict() if name not in ("gamma", "beta")]
    shapes = {name: tuple(value.shape) for name, value in router.state_dict().items()}
    router.load_state_dict({name: regenerate(name, shapes[name]) for name in names}, strict=True)
    return router.to(dtype).eval()


def random_router(paths=PATHS, dim=16, seed=0, scale=0.3):
    torch.manual_seed(seed)
    router = Router(paths, dim).eval()
    for gate in (router.lf_gate, router.layer_gate):
        torch.nn.init.normal_(gate[0].weight, std=scale)
    return router


# --- the table of the description


def test_names_and_counts_of_weights():
    for leaves, expected in ((22, 2_649_090), (19, 2_646_018), (8, 2_634_754)):
        router = Router([[0, 1, 2 + leaf] for leaf in range(leaves)])
        assert sum(p.numel() for p in router.parameters()) == expected
    linear = {f"{head}.{i}.weight" for head in ("mu", "sigma") for i in (0, 2, 4, 6, 8)}
    norms = {f"{head}.9.{name}" for head in ("mu", "sigma") for name in ("weight", "bias")}
    gates = {"lf_gate.0.weight", "layer_gate.0.weight"}
    assert {name for name, _ in router.named_parameters()} == linear | norms | gates | {"gamma", "beta"}
    assert (router.leaves, router.levels, router.experts) == (8, 3, 10)
    assert list(router.lf_gate[0].weight.shape) == [16, 512] and list(router.layer_gate[0].weight.shape) == [6, 512]


def test_routes_of_the_table():
    routes = released()(embeddings())
    assert routes.leaf.tolist() == LEAVES and routes.level.tolist() == LEVELS and routes.expert.tolist() == EXPERTS
    chosen_leaf = routes.p_leaf.gather(1, routes.leaf[:, None])[:, 0]
    chosen_level = routes.p_level.gather(1, routes.level[:, None])[:, 0]
    assert np.allclose(chosen_leaf.detach(), P_LEAF, rtol=0, atol=5e-9)
    assert np.allclose(chosen_level.detach(), P_LEVEL, rtol=0, atol=5e-9)
    assert torch.equal(routes.gate, chosen_leaf + chosen_level)
    assert abs(float(routes.degradation.detach().norm()) - 47.597982) < 5e-7
    assert abs(float(routes.uncertainty.detach().norm()) - 49.981739) < 5e-7
    for found, expected in (
        (routes.degradation[0, :4], [0.692784, -1.129926, 0.215145, -0.475518]),
        (routes.uncertainty[0, :4], [-0.436992, -0.191310, -0.794630, -0.539202]),
        (routes.logits_level[0], [1.543848, -0.408410, -0.280544]),
        (routes.logits_leaf[0, :4], [0.065071, -0.446047, -0.797497, 0.722189]),
    ):
        assert np.allclose(found.detach(), expected, rtol=0, atol=5e-7)
    assert abs(float(cv_squared(routes.p_level).detach()) - 0.30687357) < 5e-9


@pytest.mark.parametrize(
    ("node", "leaves", "experts"),
    [(4, [13] * 8, [0, 21, 0, 4, 0, 0, 0, 0]), (6, [19] * 8, [0, 27, 0, 6, 0, 0, 0, 0])],
)
def test_masks_before_the_softmax(node, leaves, experts):
    mask = torch.tensor([each == node for each in NODES])
    routes = released()(embeddings(), mask)
    assert routes.leaf.tolist() == leaves and routes.expert.tolist() == experts
    assert routes.level.tolist() == LEVELS  # all levels stay
    assert (routes.p_leaf[:, ~mask] == 0).all()
    assert torch.allclose(routes.p_leaf.sum(1), torch.ones(8).double())
    assert torch.equal(released()(embeddings(), mask.expand(8, 22)).expert, routes.expert)


# --- the released code's own outputs and gradients


@cache
def expected():
    with np.load(golden.golden_file("unirestorer_router.npz")) as data:
        return {key: torch.from_numpy(np.asarray(data[key])) for key in data.files}


def convolutions(dtype):
    """The 30 experts of the file: one convolution each."""
    experts = []
    for number in range(30):
        level, place = (0, 0) if number == 0 else (1, number - 1) if number < 8 else (2, number - 8)
        conv = torch.nn.Conv2d(3, 3, 3, padding=1)
        name = f"l{level}_experts.{place}"
        conv.load_state_dict(
            {leaf: regenerate(f"{name}.{leaf}", tuple(v.shape)) for leaf, v in conv.state_dict().items()}
        )
        experts.append(conv.to(dtype).requires_grad_(False))
    return ExpertModules(experts)


def case(kind, dtype):
    data = expected()
    router = released(dtype)
    e = data["embedding_spread" if kind == "spread" else "embedding"].to(dtype)
    if kind != "train":
        return data, router, router(e)
    router.train()
    return data, router, router(e, noise=(data["train.eps_leaf"], data["train.eps_level"]))


def test_names_are_the_released_ones():
    with open(golden.golden_file("unirestorer_router_state_dict.json")) as file:
        names = json.load(file)
    found = {name: list(value.shape) for name, value in Router(PATHS).state_dict().items()}
    wanted = {**names["parameters"], **names["buffers"]}
    wanted = {name: shape for name, shape in wanted.items() if "_experts." not in name}
    assert found == {**wanted, "gamma": [], "beta": []}
    assert expected()["tree"].tolist() == PATHS


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("kind", ["eval", "spread", "train"])
def test_what_the_released_code_computes(kind, dtype, limit):
    data, router, routes = case(kind, dtype)
    for name in ("leaf", "level", "expert"):
        assert torch.equal(getattr(routes, name), data[f"{kind}.{name}"]), name
    for name in ("logits_leaf", "logits_level", "p_leaf", "p_level", "gate"):
        assert relative_error(getattr(routes, name), data[f"{kind}.{name}"]) <= limit, name
    assert relative_error(routes.degradation, data[f"{kind}.mu"]) <= limit
    assert relative_error(routes.uncertainty, data[f"{kind}.logvar"]) <= limit
    assert relative_error(0.01 * balance_loss(routes), data[f"{kind}.aux_loss"]) <= limit
    images = data["images"].to(dtype)
    padded = torch.stack(dispatch(convolutions(dtype), list(images), routes.expert.tolist()))
    restored = convolutions(dtype).run(images, routes.expert.tolist())
    assert torch.equal(straight_through(restored, routes.gate), restored)
    assert relative_error(restored, data[f"{kind}.restored"]) <= limit
    assert relative_error(padded[:, :, :-1], restored[:, :, :-1]) <= limit  # height 12 is padded to 16
    if kind == "train":
        for head in ("mu", "sigma"):
            for name in ("running_mean", "running_var"):
                found = router.get_buffer(f"{head}.9.{name}")
                assert relative_error(found, data[f"train.buffer.{head}.9.{name}"]) <= limit


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-8), (torch.float32, 5e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("loss", ["l1", "aux", "total"])
@pytest.mark.parametrize("kind", ["train", "spread"])
def test_gradients_are_the_released_ones(kind, loss, dtype, limit):
    data, router, routes = case(kind, dtype)
    routes.degradation.retain_grad(), routes.uncertainty.retain_grad()
    restored = convolutions(dtype).run(data["images"].to(dtype), routes.expert.tolist())
    l1 = (straight_through(restored, routes.gate) - data[f"{kind}.target"].to(dtype)).abs().mean()
    assert relative_error(l1, data[f"{kind}.l1"]) <= limit
    aux = 0.01 * balance_loss(routes)
    {"l1": l1, "aux": aux, "total": l1 + aux}[loss].backward()
    prefix = f"{kind}.{loss}"
    names = [key.removeprefix(f"{prefix}.grad_norm.") for key in data if key.startswith(f"{prefix}.grad_norm.")]
    assert len(names) == 16
    floor = 1e-4 * max(float(data[f"{prefix}.grad_norm.{name}"]) for name in names)
    for name in names:
        parameter = router.get_parameter(name)
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        norm, dot = data[f"{prefix}.grad_norm.{name}"], data[f"{prefix}.grad_dot.{name}"]
        direction = torch.from_numpy(noise_of("grad." + name, tuple(grad.shape)))
        allowed = limit * max(float(norm), floor)
        assert abs(grad.double().norm() - norm) <= allowed, name
        assert abs((grad.double() * direction).sum() - dot) <= allowed, name
    wanted = {"mu": routes.degradation.grad, "logvar": routes.uncertainty.grad}
    wanted |= {name: router.get_parameter(name).grad for name in ("lf_gate.0.weight", "layer_gate.0.weight")}
    for name, grad in wanted.items():
        target = data[f"{prefix}.grad.{name}"]
        if target.any():
            assert relative_error(grad, target) <= limit, name
        else:
            assert grad is None or not grad.any(), name


def test_zero_gates_give_the_root():
    data = expected()
    router = released()
    for gate in (router.lf_gate, router.layer_gate):
        torch.nn.init.zeros_(gate[0].weight)
    routes = router(embeddings())
    for name in ("level", "expert"):
        assert torch.equal(getattr(routes, name), data[f"zero_gates.{name}"])
    for name in ("p_leaf", "p_level"):
        assert relative_error(getattr(routes, name), data[f"zero_gates.{name}"]) <= 1e-10
    assert float(0.01 * balance_loss(routes).detach()) == pytest.approx(float(data["zero_gates.aux_loss"]), abs=1e-20)


# --- properties


def test_a_new_router_sends_everything_to_the_root_by_the_first_of_equal_choices():
    torch.manual_seed(1)
    routes = Router(PATHS, 16).eval()(torch.randn(5, 16))
    assert (routes.expert == 0).all() and (routes.level == 0).all() and (routes.leaf == 0).all()
    assert torch.allclose(routes.p_leaf, torch.full((5, 22), 1 / 22))
    masked = Router(PATHS, 16).eval()(torch.randn(5, 16), torch.arange(22) >= 7)
    assert (masked.leaf == 7).all() and (masked.expert == 0).all()


def test_noise_of_a_new_router_is_as_wide_as_described():
    torch.manual_seed(0)
    router = Router([[0, 1], [0, 2]], 4).train()
    routes = router(torch.randn(20_000, 4))
    assert float(routes.logits_leaf.detach().std()) == pytest.approx(np.log(2) + 0.01, rel=0.01)
    assert len(set(routes.expert.tolist())) == 3


def test_the_expert_lies_on_the_path_of_the_leaf():
    routes = random_router()(torch.randn(200, 16, generator=torch.Generator().manual_seed(3)))
    assert len(set(routes.expert.tolist())) > 10  # all levels are in use
    for leaf, level, expert in zip(routes.leaf.tolist(), routes.level.tolist(), routes.expert.tolist(), strict=True):
        assert PATHS[leaf][level] == expert


def test_a_permuted_batch_gives_permuted_routes_and_a_batch_what_its_members_give():
    router = random_router().double()
    e = torch.randn(12, 16, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(5))
    whole, permuted = router(e), router(e[order])
    assert torch.equal(whole.expert[order], permuted.expert)
    singles = [router(each[None]) for each in e]
    assert torch.equal(torch.cat([each.expert for each in singles]), whole.expert)
    assert torch.allclose(torch.cat([each.p_leaf for each in singles]), whole.p_leaf, rtol=1e-12, atol=0)


@pytest.mark.parametrize("paths", [[[0]], [[0, 1, 2]], [[5], [5]], [[0, 1], [0, 2]]])
def test_one_leaf_or_one_level(paths):
    router = random_router(paths, 8).train()
    torch.manual_seed(0)
    routes = router(torch.randn(6, 8))
    assert routes.p_leaf.shape == (6, len(paths)) and routes.p_level.shape == (6, len(paths[0]))
    if len(paths[0]) == 1:
        assert balance_loss(routes).item() == 0
    loss = routes.gate.sum() + balance_loss(routes, "both")
    loss.backward()
    assert torch.isfinite(router.lf_gate[0].weight.grad).all()


def test_masking_all_leaves_but_one_forces_it():
    router = random_router()
    e = torch.randn(22, 16, generator=torch.Generator().manual_seed(6))
    routes = router(e, torch.eye(22, dtype=torch.bool))
    assert routes.leaf.tolist() == list(range(22))
    assert torch.equal(routes.level, router(e).level)


def test_gradients_reach_gates_and_heads_and_no_expert():
    torch.manual_seed(0)
    router = random_router([[0, 1], [0, 2]], 8).train()
    experts = [torch.nn.Conv2d(3, 3, 1) for _ in range(3)]
    images = torch.rand(4, 3, 8, 8)
    routes = router(torch.randn(4, 8))
    restored = straight_through(ExpertModules(experts).run(images, routes.expert.tolist()), routes.gate)
    loss, terms = RouterLoss(0.0, 0.0)(restored, images, routes, torch.zeros(4, 8), router)
    assert loss == terms.l1
    loss.backward()
    for module in (router.lf_gate, router.layer_gate, router.mu[0], router.sigma[0]):
        weight = module[0].weight if isinstance(module, torch.nn.Sequential) else module.weight
        assert weight.grad.abs().sum() > 0
    assert all(p.grad is None for expert in experts for p in expert.parameters())


def test_errors_say_what_was_expected():
    router = random_router([[0, 1], [0, 2]], 8)
    with pytest.raises(ValueError, match=r"expected two or more in training mode.*batch normalisation"):
        random_router(dim=8).train()(torch.randn(1, 8))
    with pytest.raises(ValueError, match=r"embeddings: expected \[B, 8\], got \[2, 9\]"):
        router(torch.randn(2, 9))
    with pytest.raises(ValueError, match="expected finite"):
        router(torch.full((2, 8), float("nan")))
    with pytest.raises(ValueError, match="at least one leaf"):
        router(torch.randn(2, 8), torch.zeros(2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"leaf_mask: expected bool \[2\]"):
        router(torch.randn(2, 8), torch.zeros(2))
    with pytest.raises(ValueError, match="noise: expected None in evaluation"):
        router(torch.randn(2, 8), noise=(torch.zeros(2, 2), torch.zeros(2, 2)))
    with pytest.raises(ValueError, match=r"noise: expected shapes \[\[2, 2\], \[2, 2\]\]"):
        router.train()(torch.randn(2, 8), noise=(torch.zeros(2, 2), torch.zeros(2, 3)))
    for paths, message in ([[0, 1], [1, 2]], "one root"), ([], "integers"), ([[0.5]], "integers"), ([[-1]], "from 0"):
        with pytest.raises(ValueError, match=message):
            Router(paths, 8)
    with pytest.raises(ValueError, match="variance: expected one of affine, log, literal"):
        Router([[0]], 8, variance="softplus")


# --- losses


@pytest.mark.parametrize(
    ("mass", "value"),
    [([[1, 0, 0]], 3), ([[1 / 3] * 3], 0), ([[0.7, 0.2, 0.1]], 0.93), ([[0.5, 0.5, 0]], 0.75),
     ([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]], 0.091875), ([[1.0]], 0), ([[1.0], [1.0]], 0)],
)  # fmt: skip
def test_cv_squared(mass, value):
    assert float(cv_squared(torch.tensor(mass, dtype=torch.float64))) == pytest.approx(value, abs=1e-8)


def test_balance_over_levels_leaves_or_both():
    routes = random_router([[0, 1], [0, 2], [0, 3]], 8)(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)))
    levels, leaves = cv_squared(routes.p_level), cv_squared(routes.p_leaf)
    assert balance_loss(routes) == levels and balance_loss(routes, "leaves") == leaves
    assert balance_loss(routes, "both") == levels + leaves and levels != leaves
    with pytest.raises(ValueError, match="balance: expected one of levels, leaves, both, got 'all'"):
        balance_loss(routes, "all")


@pytest.mark.parametrize(
    ("u", "e", "s", "value"),
    [(0, 1, 0, 0.5), (0, 1, np.log(2), 0.596574), (0, 1, -1, 0.859141), (0, 2, np.log(4), 1.193147)],
)
def test_centre_loss_with_the_head_as_log_variance(u, e, s, value):
    router = Router([[0]], 1, variance="log")
    s = router.log_variance(torch.tensor([[s]], dtype=torch.float64))
    loss = centre_loss(*(torch.tensor([[x]], dtype=torch.float64) for x in (u, e)), s)
    assert float(loss) == pytest.approx(value, abs=5e-7)


def test_centre_loss_is_least_where_the_variance_is_the_squared_distance():
    u, e = torch.zeros(1, 1).double(), torch.full((1, 1), 2.0).double()
    s = torch.linspace(-2, 4, 6001).double()
    losses = torch.stack([centre_loss(u, e, each.reshape(1, 1)) for each in s])
    assert float(s[losses.argmin()]) == pytest.approx(np.log(4), abs=1e-3)
    assert float(losses.min()) == pytest.approx(0.5 + 0.5 * np.log(4), abs=1e-6)


@pytest.mark.parametrize(("distance", "value"), [(0.03, -3.006515), (0.05, -2.129209)])
def test_centre_loss_in_the_affine_mode(distance, value):
    router = Router([[0]], 1).double()
    loss = centre_loss(
        torch.zeros(1, 1).double(), torch.full((1, 1), distance).double(), router.log_variance(torch.zeros(1, 1))
    )
    assert float(loss) == pytest.approx(value, abs=5e-6)
    loss.backward()
    assert router.beta.grad is not None and router.gamma.grad is not None


def test_centre_loss_in_the_literal_mode():
    head = torch.tensor([[-30.0, 0.0, 5.0]], dtype=torch.float64)
    variance = torch.nn.functional.softplus(head) + 1e-6
    e = torch.full((1, 3), 0.5, dtype=torch.float64)
    direct = (e.square() / (2 * variance) + variance.log() / 2).mean()
    found = centre_loss(torch.zeros_like(e), e, Router([[0]], 3, variance="literal").log_variance(head))
    assert float(found) == pytest.approx(float(direct), rel=1e-12)


def test_the_total_has_each_weight_once():
    torch.manual_seed(0)
    router = random_router([[0, 1], [0, 2]], 8).train()
    routes = router(torch.randn(6, 8))
    images, centres = torch.rand(2, 6, 3, 8, 8), torch.randn(6, 8)
    total, terms = RouterLoss()(images[0], images[1], routes, centres, router)
    assert torch.isclose(total, terms.l1 + 0.1 * terms.centre + 0.01 * terms.balance)
    assert terms.balance == cv_squared(routes.p_level)
    assert terms.l1 == (images[0] - images[1]).abs().mean()
    with pytest.raises(ValueError, match="centre_weight: expected 0 or more, got -1"):
        RouterLoss(-1)


# --- the dispatcher


class Counting(torch.nn.Module):
    """Adds its number; notes the shapes that it sees."""

    def __init__(self, number):
        super().__init__()
        self.number, self.seen = number, []

    def forward(self, x):
        self.seen.append(list(x.shape))
        return x + self.number


def test_images_of_mixed_sizes_go_to_their_experts_and_come_back_in_order():
    experts = [Counting(number) for number in range(4)]
    sizes = [(16, 24), (13, 21), (8, 8), (16, 24), (3, 5), (16, 24)]
    numbers = [2, 2, 0, 2, 3, 0]
    images = [torch.rand(3, *size) for size in sizes]
    restored = dispatch(ExpertModules(experts), images, numbers)
    for image, number, result in zip(images, numbers, restored, strict=True):
        assert torch.equal(result, image + number)
    assert [expert.seen for expert in experts] == [
        [[1, 3, 8, 8], [1, 3, 16, 24]], [], [[3, 3, 16, 24]], [[1, 3, 8, 8]],
    ]  # fmt: skip


def test_padding_is_mirrored_and_where_that_is_too_short_repeated():
    class Sees(torch.nn.Module):
        def forward(self, x):
            self.x = x
            return x

    expert = Sees()
    image = torch.rand(3, 6, 2)
    dispatch(ExpertModules([expert]), [image], [0])
    mirrored = torch.cat([image, image[:, [4, 3]]], 1)
    assert torch.equal(expert.x[0], torch.cat([mirrored, mirrored[:, :, [1] * 6]], 2))


def test_dispatch_refuses_what_does_not_fit():
    experts = ExpertModules([Counting(0)])
    with pytest.raises(ValueError, match="expected experts from 0 to 0, got 1"):
        dispatch(experts, [torch.rand(3, 8, 8)], [1])
    with pytest.raises(ValueError, match="one for each of 1 images, got 0"):
        dispatch(experts, [torch.rand(3, 8, 8)], [])
    with pytest.raises(ValueError, match=r"expected \[3, H, W\]"):
        dispatch(experts, [torch.rand(1, 3, 8, 8)], [0])
    with pytest.raises(ValueError, match="at least one expert"):
        ExpertModules([])
