"""Routers and experts that train: what learns, what does not, what is resumed, and what is told."""

from __future__ import annotations

import csv
import json

import pytest
import torch
import unirestorer_toy
from train_cases import SMALL, settings, write_pictures
from unirestorer_toy import OFFSETS, Stripes, added, batch, experts, parts, router, tree

import mirage
from mirage.checkpoint import CheckpointError
from mirage.train.config import ConfigError
from mirage.train.data.samples import TrainingSet
from mirage.unirestorer import (
    ExpertModules,
    ExpertTrainings,
    ExpertTree,
    MemberSet,
    Node,
    RoutedNetwork,
    Router,
    RouterLoss,
    RouterRun,
    RouterSettings,
    SystemFolder,
    TrainExpert,
    collapsed_experts,
    embed_samples,
    load_router,
    save_router,
)
from mirage.unirestorer.expert_training import parse_steps
from mirage.unirestorer.samples import data_identity, one_set_a_kind

ARGUMENTS = {name: value for name, value in SMALL.items() if not name.startswith("spd")}
KINDS = "data.sets=[{clean: clean, kind: [GN, {kind: GB, sigma: 3}, low_haze]}]"
COMMON = [KINDS, "model.drop_path=0", "model.spd=false", f"model.arguments={json.dumps(ARGUMENTS)}", "schedule.steps=2"]


@pytest.fixture
def root(tmp_path):
    write_pictures(tmp_path / "clean")
    write_pictures(tmp_path / "test", count=2, seed=1)
    return tmp_path


def config_of(root, *overrides, out="run"):
    return settings(root, *COMMON, *overrides, out=out)


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# --- the router


@pytest.mark.parametrize("seed", [0, 1])
def test_a_briefly_trained_router_beats_chance_and_is_finer_where_it_knows(seed):
    """A quarter of the images has next to no stripes, which the root restores best: so the level depends on the image,
    and images between what was trained go to coarser levels."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    extractor, own_tree, _, own_experts = parts()
    network = RoutedNetwork(Router(own_tree.paths, Stripes.dim), extractor, own_tree, own_experts).train()
    loss, optimizer = RouterLoss(), torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(300):
        degraded, clean, _ = batch(16, generator=generator)
        degraded[::4] = (clean + added(0.05 * torch.randn(16, 3, generator=generator), 8, 8))[::4]
        restored, routes, own = network(degraded)
        optimizer.zero_grad()
        loss(restored, clean, routes, own, network.router)[0].backward()
        optimizer.step()
    network.eval()
    degraded, clean, leaf = batch(200, generator=generator)
    known = network.router(extractor.embed(degraded))
    assert (known.leaf == leaf).float().mean() > 0.6  # chance is 0.25
    of_root = (own_experts.run(degraded, [0] * 200) - clean).abs().mean()
    assert (network(degraded) - clean).abs().mean() < 0.85 * of_root
    for offsets in (OFFSETS / 2, torch.tensor([[0, 0.2, 0.2], [0, -0.2, -0.2], [0, 0.2, -0.2], [0, -0.2, 0.2]])):
        between = network.router(extractor.embed(batch(200, offsets=offsets, generator=generator)[0]))
        assert between.level.float().mean() + 0.4 < known.level.float().mean()


def test_expected_errors_teach_levels_where_all_images_agree():
    """By the chosen expert's error alone, whichever is chosen loses, and levels stay about as likely as each other."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    extractor, own_tree, _, own_experts = parts()
    network = RoutedNetwork(Router(own_tree.paths, Stripes.dim), extractor, own_tree, own_experts).train()
    loss, optimizer = RouterLoss(), torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(200):
        degraded, clean, _ = batch(16, generator=generator)
        errors, routes, centres, leaves = network(degraded, clean)
        optimizer.zero_grad()
        loss.expected(errors, leaves, routes, centres, network.router)[0].backward()
        optimizer.step()
    on_path = own_tree.paths[routes.leaf]
    for level in range(3):
        restored = own_experts.run(degraded, on_path[:, level].tolist())
        assert torch.allclose(errors[:, level], (restored - clean).abs().mean((1, 2, 3)))
    network.eval()
    degraded, clean, leaf = batch(200, generator=generator)
    routes = network.router(extractor.embed(degraded))
    assert (routes.level > 0).all() and (routes.leaf == leaf).float().mean() > 0.9
    of_root = (own_experts.run(degraded, [0] * 200) - clean).abs().mean()
    assert (network(degraded) - clean).abs().mean() < 0.5 * of_root


def toy_run(config, **arguments):
    extractor, own_tree, _, own_experts = parts()
    return RouterRun(config, extractor, own_tree, own_experts, **arguments)


def test_a_run_trains_the_router_alone_and_tells_what_was_used(root):
    validation = "data.validation=[{name: noise, clean: test, kind: GN}]"
    config = config_of(root, validation, "data.batch=4", "schedule.steps=4", "output.validate_steps=2")
    run = toy_run(config)
    before = {name: value.clone() for name, value in run.network.state_dict().items()}
    assert set(before) == {f"router.{name}" for name in router().state_dict()}
    untouched = [p.clone() for expert in run.parts[2].modules for p in expert.parameters()]
    run.train()
    changed = {name for name, value in run.network.state_dict().items() if not torch.equal(before[name], value)}
    for name in ("lf_gate.0.weight", "layer_gate.0.weight", "mu.0.weight", "sigma.9.running_mean", "beta"):
        assert f"router.{name}" in changed
    assert all(map(torch.equal, untouched, (p for expert in run.parts[2].modules for p in expert.parameters())))
    train = rows(config_folder(config) / "train.csv")
    assert len(train) == 4 and {"loss", "l1", "centre", "balance", "level_0", "level_1", "level_2"} <= set(train[0])
    assert all(sum(float(row[f"level_{i}"]) for i in range(3)) == pytest.approx(1) for row in train)
    total = [float(r["l1"]) + 0.1 * float(r["centre"]) + 0.01 * float(r["balance"]) for r in train]
    assert total == pytest.approx([float(r["loss"]) for r in train], rel=1e-4)
    usage = rows(config_folder(config) / "usage.csv")
    assert [int(row["step"]) for row in usage] == [2, 4]
    for name in ("train", "validation"):
        assert sum(float(usage[1][f"{name}_{i}"]) for i in range(7)) == pytest.approx(1, abs=1e-5)
    assert "noise" in rows(config_folder(config) / "validation.csv")[0]


def config_folder(config):
    from pathlib import Path

    return Path(config.output.folder)


@pytest.mark.parametrize("objective", ["gate", "expected"])
def test_a_stopped_run_goes_on_bit_for_bit(root, objective):
    settings_of = {"settings": RouterSettings(objective=objective)}
    overrides = ["data.batch=4", "schedule.steps=4", "trainer.ema=0.5", "schedule.kind=wsd"]
    whole = toy_run(config_of(root, *overrides, out="whole"), **settings_of)
    whole.train()
    first = toy_run(config_of(root, *overrides, "schedule.steps=2", out="parts"), **settings_of)
    first.train()
    second = toy_run(config_of(root, *overrides, out="parts"), **settings_of)
    assert second.resumed is not None and second.step == 2
    second.train()
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, second.network.state_dict()[name]), name
    assert second.router is not second.network.router  # the averaged one
    other = ExpertTree.from_paths([[0, 1], [0, 2]])
    nodes = [Node(n.id, n.level, n.parent, torch.zeros(8).double()) for n in other.nodes]
    with pytest.raises(CheckpointError, match="is of a router with other paths than this tree's"):
        RouterRun(config_of(root, *overrides, out="parts"), Stripes(), ExpertTree(nodes), ExpertModules(experts()[:3]))


def test_batches_of_one_are_refused_and_say_why(root):
    with pytest.raises(ConfigError, match="two or more samples a pass, got 2 in 2 passes.*batch normalisation"):
        toy_run(config_of(root, "data.batch=2", "trainer.accumulate=2"))
    with pytest.raises(ValueError, match="objective: expected one of gate, expected, got 'best'"):
        RouterSettings(objective="best")


def test_two_processes_train_one_router_and_count_what_both_used(root):
    """In each mode of the variance: a weight that nothing used would be an error of the second step."""
    fabric = pytest.importorskip("lightning_fabric").Fabric(accelerator="cpu", devices=2, strategy="ddp_spawn")
    config_of(root)  # writes the file that both read
    fabric.launch(unirestorer_toy.work, root, [*COMMON, "data.batch=4", "output.validate_steps=2"])
    first, second = (torch.load(root / f"rank{rank}.pt") for rank in range(2))
    for variance in ("affine", "log", "literal"):
        a, b = first[variance], second[variance]
        for name in ("router.lf_gate.0.weight", "router.mu.0.weight", "router.beta"):
            assert torch.equal(a[name], b[name])
        assert torch.equal(a["used"], b["used"]) and int(a["used"].sum()) == 8  # two steps of four


def test_experts_that_get_next_to_nothing_are_found():
    own = tree()
    share = [1 / 3, 1 / 6, 1 / 6, 1 / 12, 1 / 12, 1 / 12, 1 / 12]
    even = [round(1200 * each) for each in share]
    assert collapsed_experts(even, own) == []
    assert collapsed_experts([*even[:3], 300, 0, 0, 100], own) == [4, 5]
    assert collapsed_experts([*even[:3], 298, 1, 1, 100], own) == []  # 1% of 100 images is one image
    assert collapsed_experts([100, 0, 0, 0, 0, 0, 0], own) == []  # a share of 17 images is too small to tell
    assert collapsed_experts([200, 0, 0, 0, 0, 0, 0], own) == [1, 2]
    assert collapsed_experts([0, 300, 0], ExpertTree.from_paths([[0, 1], [0, 2]])) == [0, 2]


def test_a_collapsed_expert_is_warned_about(root, capsys):
    run = toy_run(config_of(root, "data.batch=4", "schedule.steps=1", "output.validate_steps=1"))
    run.used += torch.tensor([400, 200, 200, 100, 100, 0, 100])
    run.train()
    assert 5 in run.collapsed
    assert "less than 1% of their share" in capsys.readouterr().out


def test_a_router_in_a_file_is_the_same_router(tmp_path):
    made = router()
    save_router(made, tmp_path / "router.safetensors", RouterSettings())
    again = load_router(tmp_path / "router.safetensors")
    assert again.config == made.config and not again.training
    e = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(e).logits_leaf, made(e).logits_leaf) and torch.equal(again(e).expert, made(e).expert)
    (tmp_path / "other.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not readable as a router"):
        load_router(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError, match="no router at"):
        load_router(tmp_path / "absent.safetensors")
    with torch.no_grad():
        made.beta.fill_(float("nan"))
    with pytest.raises(ValueError, match="beta holds values that are not finite"):
        save_router(made, tmp_path / "nan.safetensors")


# --- samples and experts


def test_samples_are_those_of_the_training_by_their_numbers(root):
    config = config_of(root)
    data = one_set_a_kind(config.data)
    assert [one.name for one in data.sets] == ["GN", "GB", "low_haze"]
    every, members = TrainingSet(data, config.seed), [3, 20, 11]
    own = MemberSet(config.data.__class__(**{**vars(data)}), config.seed, members)
    assert own.epoch == 3
    for epoch in range(2):
        seen = [own[3 * epoch + i] for i in range(3)]
        for sample in (every[number] for number in members):
            assert sum(torch.equal(sample.degraded, each.degraded) for each in seen) == 1
    first, second = ([own[3 * e + i].name for i in range(3)] for e in (0, 7))
    assert sorted(first) == sorted(second)
    with pytest.raises(ValueError, match="members: expected at least one sample"):
        MemberSet(data, 0, [])


def test_embedding_goes_on_where_it_was_and_not_with_other_data(root):
    config, cache = config_of(root), root / "embeddings.safetensors"
    whole, tasks = embed_samples(config, 10, Stripes(), batch=4)
    assert whole.shape == (10, 8) and set(tasks) <= {"GN", "GB", "low_haze"}
    first, _ = embed_samples(config, 6, Stripes(), batch=4, cache=cache)
    assert torch.equal(first, whole[:6])

    class Limited(Stripes):
        seen = 0

        def embed(self, images):
            Limited.seen += len(images)
            return super().embed(images)

    again, more = embed_samples(config, 10, Limited(), batch=4, cache=cache)
    assert torch.allclose(again, whole, atol=1e-6) and more == tasks and Limited.seen == 4
    embed_samples(config_of(root, "seed=5"), 10, Limited(), batch=4, cache=cache)
    assert Limited.seen == 14
    assert data_identity(config) != data_identity(config_of(root, "seed=5"))
    assert data_identity(config) == data_identity(config_of(root, "data.batch=8", "data.workers=0", "optimizer.lr=1"))


def two_leaves():
    """A root and two leaves, of eight samples."""
    zero = torch.zeros(8).double()
    return ExpertTree(
        [
            Node(0, 0, None, zero, torch.arange(8), {"GN": 4, "GB": 4}),
            Node(1, 1, 0, zero + 1, torch.arange(4), {"GN": 4}),
            Node(2, 1, 0, zero - 1, torch.arange(4, 8), {"GB": 4}),
        ]
    )


@pytest.mark.parametrize("rank", [None, 2])
def test_each_node_s_expert_trains_on_its_samples(root, rank):
    from mirage.unirestorer.lora import LoRASettings

    lora = None if rank is None else LoRASettings(rank, 4.0)
    folder = SystemFolder(root / "system")
    seen = []
    trainings = ExpertTrainings(
        folder.experts_folder, two_leaves(), TrainExpert(config_of(root), lora), on_done=seen.append
    )
    assert trainings.missing == [0, 1, 2]
    files = trainings.run()
    assert seen == ["000", "001", "002"] and trainings.missing == [] and all(file.is_file() for file in files)
    assert trainings.step_of("002") == 2 and not list(folder.experts_folder.rglob("*.ckpt"))
    trainings.run()
    assert len(seen) == 3  # nothing is trained twice

    two_leaves().save(folder.tree_file)
    stored = folder.experts(device="cpu", fast=False)
    x = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    restored = stored.run(x, [0, 1, 2])
    network = mirage.from_checkpoint(files[0])
    assert torch.allclose(restored[:1], network(x[:1]), atol=1e-6)
    assert stored.store.kind("002") == ("full" if rank is None else "lora")
    if rank is None:  # the trainer's own result on these samples
        from mirage.unirestorer.expert_training import ExpertRun

        run = ExpertRun(config_of(root, out="plain"), two_leaves().nodes[2].members.tolist())
        run.train()
        state = mirage.from_checkpoint(files[2]).state_dict()
        assert all(torch.equal(value, state[name]) for name, value in run.network.state_dict().items() if name in state)
    with pytest.raises(ValueError, match=r"holds experts of other settings \(train.optimizer.lr"):
        ExpertTrainings(folder.experts_folder, two_leaves(), TrainExpert(config_of(root, "optimizer.lr=1"), lora))


def test_experts_of_each_level_train_for_steps_of_their_own(root):
    folder = root / "experts"
    plain = TrainExpert(config_of(root))
    train = TrainExpert(config_of(root), level_steps=(3, 1))
    assert "level_steps" not in plain.identity and train.identity["level_steps"] == [3, 1]
    trainings = ExpertTrainings(folder, two_leaves(), train)
    assert [trainings.steps_of(name) for name in ("000", "001", "002")] == [3, 1, 1]
    trainings.run()
    assert [trainings.step_of(name) for name in ("000", "001", "002")] == [3, 1, 1]
    alone = ExpertTrainings(root / "alone", two_leaves(), TrainExpert(config_of(root, "schedule.steps=3")))
    (file,) = alone.run([0])  # what the configuration would have given the root
    assert file.read_bytes() == (folder / "000.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"other settings \(train.level_steps"):
        ExpertTrainings(folder, two_leaves(), TrainExpert(config_of(root), level_steps=(3, 2)))


@pytest.mark.parametrize("rank", [None, 2])
def test_nodes_may_have_networks_of_their_own(root, rank):
    """A tree of three: a MIRAGE, one like it (or LoRA on it), and a NAFNet, which run side by side."""
    from mirage import networks
    from mirage.train.config import Model
    from mirage.unirestorer.lora import LoRASettings

    arguments = {"width": 4, "encoder_blocks": [1], "middle_blocks": 1, "decoder_blocks": [1]}
    own = {2: Model(network="nafnet", arguments=arguments, spd=False)}
    lora = None if rank is None else LoRASettings(rank, 4.0)
    plain, train = TrainExpert(config_of(root), lora), TrainExpert(config_of(root), lora, models=own)
    assert "models" not in plain.identity and train.identity["models"]["2"]["network"] == "nafnet"
    folder = SystemFolder(root / "system")
    files = ExpertTrainings(folder.experts_folder, two_leaves(), train).run()
    nafnet = networks.load(files[2])
    assert type(nafnet) is networks.NAFNet and type(networks.load(files[0])) is mirage.MIRAGE

    two_leaves().save(folder.tree_file)
    stored = folder.experts(device="cpu", fast=False)
    x = torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    restored = stored.run(x, [0, 1, 2])
    assert [stored.store.kind(name) for name in ("001", "002")] == ["full" if rank is None else "lora", "full"]
    with torch.no_grad():
        assert torch.allclose(restored[2:], nafnet.eval()(x[2:]), atol=1e-5)
    with pytest.raises(ValueError, match=r"other settings \(train.models"):
        ExpertTrainings(folder.experts_folder, two_leaves(), plain)
    with pytest.raises(ValueError, match=r"models: expected nodes from 0 to 2, got \[3\]"):
        ExpertTrainings(root / "others", two_leaves(), TrainExpert(config_of(root), models={3: own[2]}))


@pytest.mark.parametrize("steps", [(), (0, 1), (1, -1), (1.0, 1), (True, 1)])
def test_steps_that_are_none_are_refused(root, steps):
    with pytest.raises(ValueError, match="level_steps: expected a positive integer for each level, got"):
        TrainExpert(config_of(root), level_steps=steps)


def test_steps_of_other_levels_are_refused(root):
    train = TrainExpert(config_of(root), level_steps=(1, 1, 1))
    with pytest.raises(ValueError, match="expected one for each of the tree's 2 levels, got"):
        ExpertTrainings(root / "experts", two_leaves(), train)
    assert not (root / "experts").exists()
    assert parse_steps("16000, 2000") == parse_steps("16000 2000") == (16000, 2000)
    for text in ("", "2 x", "0", "-1", "1.5"):
        with pytest.raises(ValueError, match="level_steps: expected a positive integer for each level, such as"):
            parse_steps(text)


def test_what_cannot_be_trained_is_told(root):
    from mirage.unirestorer.lora import LoRASettings

    with pytest.raises(ValueError, match="expected samples in every node, got none in"):
        ExpertTrainings(root / "experts", ExpertTree.from_paths([[0, 1], [0, 2]]), TrainExpert(config_of(root)))
    with pytest.raises(FileNotFoundError, match="no root at .* train node 0 first"):
        TrainExpert(config_of(root), LoRASettings(2, 4.0))(1, [0], root / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"2 of 3 experts are not in .*, such as 001.safetensors"):
        folder = SystemFolder(root / "system")
        two_leaves().save(folder.tree_file)
        ExpertTrainings(folder.experts_folder, two_leaves(), TrainExpert(config_of(root))).run([0])
        folder.experts(device="cpu")


def test_balance_is_asked_for_where_levels_are_not_all_tried():
    assert RouterSettings().balance_weight == RouterSettings(objective="gate").balance_weight == 0.01
    assert RouterSettings(objective="expected").balance_weight == 0.0
    assert RouterSettings(objective="expected", balance_weight=0.02).balance_weight == 0.02
    assert RouterSettings(balance_weight=0.0).balance_weight == 0.0
