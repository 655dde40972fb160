"""Where the network sits in a file, whose averaged weights are read, and that what is saved can be read back."""

import copy
import re

import pytest
import safetensors.torch
import torch
from golden import load_golden_weights, mirage_mini
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import mirage
import mirage.checkpoint
from mirage import CheckpointError, CheckpointWarning, from_checkpoint, load_checkpoint, save_checkpoint


@pytest.fixture(autouse=True)
def mini_is_told_by_its_shapes(monkeypatch) -> None:
    """A smaller network for the names of MIRAGE-T and MIRAGE-S, which are the same."""
    monkeypatch.setitem(mirage.checkpoint.BY_DIM, 12, mirage_mini)


@pytest.fixture(scope="module")
def model() -> mirage.MIRAGE:
    return load_golden_weights(mirage_mini())


@pytest.fixture(scope="module")
def raw(model) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


@pytest.fixture(scope="module")
def average(raw) -> dict[str, torch.Tensor]:
    return {name: value / 2 if value.is_floating_point() else value.clone() for name, value in raw.items()}


def behind(prefix: str, state) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in state.items()}


def saved(content, tmp_path, name="x.pth"):
    torch.save(content, tmp_path / name)
    return tmp_path / name


def assert_same(state, expected) -> None:
    assert set(state) == set(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)


OTHERS = {"perceptual.conv1.weight": torch.ones(3, 3), "perceptual.conv1.bias": torch.ones(3)}
ONE_CANDIDATE = {
    "params": lambda s: {"params": s},
    "model": lambda s: {"model": s, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": s["output.weight"]}}}},
    "model_state_dict": lambda s: {"model_state_dict": s, "optimizer_state_dict": {"state": {}, "param_groups": []}},
    "ema alone": lambda s: {"ema": s},
    "generator and discriminator": lambda s: {"generator": s, "discriminator": {"conv.weight": torch.ones(1, 3, 3, 3)}},
    "two levels": lambda s: {"models": {"restorer": {"state_dict": s}}},
    "prefix model.": lambda s: {"state_dict": behind("model.", s)},
    "prefix net_g.": lambda s: behind("net_g.", s),
    "prefixes": lambda s: {"params": behind("module.backbone.net.", s)},
    "beside a loss": lambda s: {"state_dict": {**behind("net.", s), **OTHERS}},
    "averaged model": lambda s: {"n_averaged": torch.tensor(5), **behind("module.", s)},
    "beside an epoch": lambda s: {"epoch": 3, **behind("net.", s)},
    "twice the same": lambda s: {"state_dict": {**behind("net.", s), **behind("model.", s)}},
    "equal average": lambda s: {"params": s, "params_ema": copy.deepcopy(s)},
    "a metric": lambda s: {"state_dict": s, "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(31.0)}}},
    "beside a ViT": lambda s: {"net": s, "dino": {"patch_embed.proj.weight": torch.ones(384, 3, 14, 14)}},
}


@pytest.mark.parametrize("layout", ONE_CANDIDATE.values(), ids=ONE_CANDIDATE)
@pytest.mark.filterwarnings("error")
def test_one_candidate_loads(layout, raw, tmp_path) -> None:
    path = saved(layout(raw), tmp_path)
    assert_same(from_checkpoint(path).state_dict(), raw)
    assert_same(load_checkpoint(path), raw)
    assert_same(load_checkpoint(path, mirage_mini()), raw)


WITH_AVERAGE = {
    "timm": (lambda s, e: {"state_dict": s, "state_dict_ema": e}, "state_dict", "state_dict_ema"),
    "BasicSR": (lambda s, e: {"params_ema": e, "params": s}, "params", "params_ema"),
    "module": (lambda s, e: {"state_dict": behind("net.", s) | behind("ema.net.", e)}, "state_dict.net", "ema.net"),
    "bare": (lambda s, e: {**s, **behind("ema.", e)}, "", "ema"),
    "camel case": (lambda s, e: {"netG": s, "netEMA": e}, "netG", "netEMA"),
    "AveragedModel": (
        lambda s, e: {"model": s, "swag": {"n_averaged": torch.tensor(9), **behind("module.", e)}},
        "model",
        "swag",
    ),
    "Lightning": (
        lambda s, e: {
            "state_dict": behind("net.", e),
            "current_model_state": behind("net.", s),
            "averaging_state": {"n_averaged": torch.tensor(9)},
        },
        "current_model_state.net",
        "state_dict.net",
    ),
    "ema-pytorch": (
        lambda s, e: {"step": torch.tensor(1), **behind("online_model.", s), **behind("ema_model.", e)},
        "online_model",
        "ema_model",
    ),
}


@pytest.mark.parametrize(("layout", "first", "second"), WITH_AVERAGE.values(), ids=WITH_AVERAGE)
def test_averaged_weights_are_preferred_and_said(layout, first, second, raw, average, tmp_path) -> None:
    path = saved(layout(raw, average), tmp_path)
    with pytest.warns(CheckpointWarning, match="averaged ones are read") as caught:
        assert_same(from_checkpoint(path).state_dict(), average)
    assert caught[0].filename == __file__
    with pytest.warns(CheckpointWarning):
        assert_same(load_checkpoint(path, mirage_mini()), average)
    call = re.search(r"from_checkpoint\(.*\)$", str(caught[0].message)).group(0)  # as printed, it reads the others
    assert_same(eval(call).state_dict(), raw)
    assert_same(from_checkpoint(path, key=first).state_dict(), raw)
    assert_same(from_checkpoint(path, key=second).state_dict(), average)


def test_averaged_weights_in_safetensors(raw, average, tmp_path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({**behind("net.", raw), **behind("net_ema.", average)}, path)
    with pytest.warns(CheckpointWarning, match="'net_ema' beside those at 'net'"):
        assert_same(from_checkpoint(path).state_dict(), average)


@pytest.mark.filterwarnings("error")
def test_several_candidates_are_listed_with_the_call_that_reads_one(raw, average, tmp_path) -> None:
    third = {name: value * 3 if value.is_floating_point() else value for name, value in raw.items()}
    path = saved({"student": raw, "teacher": average, "best": third}, tmp_path)
    with pytest.raises(CheckpointError) as caught:
        from_checkpoint(path)
    message = str(caught.value)
    tensors, values = len(raw), sum(v.numel() for v in raw.values())
    for name in ("student", "teacher", "best"):
        assert f"key={name!r}: {tensors} tensors, {values:,} values" in message
    assert len(message.splitlines()) == 4  # no wall of keys
    call = re.search(r"from_checkpoint\([^)]*\)", message).group(0)
    assert_same(eval(call).state_dict(), raw)
    assert_same(load_checkpoint(path, key="teacher"), average)
    with pytest.raises(CheckpointError, match="nothing at 'ema'"):
        from_checkpoint(path, key="ema")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "layout",
    [
        lambda s, e, t: {"params": s, "params_ema": e, "params_old": t},  # an average of which of the two?
        lambda s, e, t: {"params": s, "params_ema": e, "params_swa": t},
        lambda s, e, t: {"params": s, "params_ema": {k: v for k, v in e.items() if "running" not in k}},
    ],
    ids=["two others", "two averages", "an average without statistics"],
)
def test_an_average_of_doubt_is_asked_for(layout, raw, average, tmp_path) -> None:
    third = {name: value * 3 if value.is_floating_point() else value for name, value in raw.items()}
    path = saved(layout(raw, average, third), tmp_path)
    with pytest.raises(CheckpointError, match="(2|3) networks, and which one is meant is not said.*") as caught:
        from_checkpoint(path)
    assert "key='params_ema'" in str(caught.value) and "key='params'" in str(caught.value)
    assert_same(from_checkpoint(path, key="params").state_dict(), raw)


@pytest.mark.parametrize(
    "averages",
    [
        lambda e: {"ema": {"decay": 0.999, "shadow_params": list(e.values())}},
        lambda e: {"state_dict_ema": {name.replace(".", ""): value for name, value in e.items()}},
    ],
    ids=["list", "names without dots"],
)
def test_averages_that_cannot_be_read_are_mentioned(averages, raw, average, tmp_path) -> None:
    path = saved({"state_dict": raw, **averages(average)}, tmp_path)
    with pytest.warns(CheckpointWarning, match=f"{len(raw)} tensors at '(ema|state_dict_ema)' look like averaged"):
        assert_same(from_checkpoint(path).state_dict(), raw)


def test_a_key_may_name_the_beginning_or_the_end(raw, average, tmp_path) -> None:
    path = saved({"state_dict": {**behind("net.", raw), **behind("teacher.net.", average)}}, tmp_path)
    assert_same(load_checkpoint(path, key="state_dict.teacher"), average)
    assert_same(load_checkpoint(path, key="teacher.net"), average)
    assert_same(load_checkpoint(path, key="state_dict.net"), raw)
    with pytest.raises(CheckpointError, match="more than one network at 'net'"):
        load_checkpoint(path, key="net")


def test_state_dicts_of_other_networks(tmp_path) -> None:
    linear, other = nn.Linear(2, 3), nn.Linear(2, 3)
    path = saved({"params": linear.state_dict(), "epoch": 3}, tmp_path)
    assert_same(load_checkpoint(path), linear.state_dict())
    path = saved({"state_dict": linear.state_dict(), "state_dict_ema": other.state_dict()}, tmp_path)
    with pytest.warns(CheckpointWarning, match="averaged ones are read"):
        assert_same(load_checkpoint(path), other.state_dict())
    target = nn.Linear(2, 3)
    load_checkpoint(path, target, key="state_dict")
    assert_same(target.state_dict(), linear.state_dict())
    path = saved({"a": linear.state_dict(), "b": other.state_dict()}, tmp_path)
    with pytest.raises(CheckpointError, match="2 networks"):
        load_checkpoint(path)
    assert_same(load_checkpoint(path, key="b"), other.state_dict())


# --- what is saved can be read


class Training(nn.Module):
    """A network beside a loss with weights, as a training loop holds them."""

    def __init__(self, net: nn.Module, **more: nn.Module) -> None:
        super().__init__()
        self.net, self.loss = net, nn.Conv2d(3, 4, 3)
        for name, module in more.items():
            setattr(self, name, module)


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


WRAPPERS = {
    "AveragedModel": AveragedModel,
    "EMA with buffers": lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
    "training module": Training,
    "attribute model": Wrapper,
    "compiled": torch.compile,
    "DataParallel": nn.DataParallel,
    "all": lambda m: AveragedModel(Wrapper(nn.DataParallel(torch.compile(m)))),
    "twice the same": lambda m: Training(m, model=m),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_what_is_saved_of_a_wrapper_is_read_back(wrap, tmp_path) -> None:
    mini = load_golden_weights(mirage_mini())
    save_checkpoint(wrap(mini), tmp_path / "x.safetensors")
    loaded = from_checkpoint(tmp_path / "x.safetensors")
    assert loaded.config == mini.config
    assert_same(loaded.state_dict(), mini.state_dict())
    target = wrap(mirage_mini())
    load_checkpoint(tmp_path / "x.safetensors", target)
    (inner,) = (module for module in target.modules() if isinstance(module, mirage.MIRAGE))
    assert_same(inner.state_dict(), mini.state_dict())


def test_a_training_module_reads_its_own_weights(tmp_path) -> None:
    source, target = Training(mirage_mini()), Training(mirage_mini())
    path = saved({"state_dict": source.state_dict()}, tmp_path)
    load_checkpoint(path, target)
    assert_same(target.state_dict(), source.state_dict())


def test_of_several_networks_one_has_to_be_named(tmp_path) -> None:
    module = Training(mirage_mini(), ema=AveragedModel(mirage_mini()))
    with pytest.raises(ValueError, match="holds 2 MIRAGE networks, save one of them: model.net, model.ema.module"):
        save_checkpoint(module, tmp_path / "x.safetensors")
    save_checkpoint(module.ema, tmp_path / "x.safetensors")
    assert_same(from_checkpoint(tmp_path / "x.safetensors").state_dict(), module.ema.module.state_dict())


def test_what_could_not_be_read_back_is_not_written(tmp_path) -> None:
    mini = mirage_mini()
    torch.nn.utils.parametrizations.weight_norm(mini.output)
    with pytest.raises(ValueError, match="3 weights are not those of MIRAGE.*parametrizations"):
        save_checkpoint(mini, tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_network_in_a_training_module(tmp_path) -> None:
    """The authors' own class is no `mirage.MIRAGE`; its weights have the same names."""
    source = mirage_mini()
    foreign = nn.Module()
    for name, child in source.named_children():
        foreign.add_module(name, child)
    save_checkpoint(Training(foreign), tmp_path / "x.safetensors")
    assert_same(from_checkpoint(tmp_path / "x.safetensors").state_dict(), source.state_dict())
    with pytest.raises(ValueError, match="model.net, model.ema"):
        save_checkpoint(Training(foreign, ema=copy.deepcopy(foreign)), tmp_path / "y.safetensors")
