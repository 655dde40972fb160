"""LoRA in files: ours, loralib's and PEFT's."""

import json

import golden
import pytest
import safetensors.torch
import torch
from torch import nn

from mirage.checkpoint import CheckpointError
from mirage.unirestorer import add_lora, fold, load_lora, lora_settings, lora_state, remove_lora, save_lora
from mirage.unirestorer.lora import adapters, lora_parameters

X = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class Small(nn.Module):
    """A convolution of each kind, a norm, and a linear layer; one is called as the wrapped ones are."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.Sequential(nn.Conv2d(4, 3, 1), nn.Conv2d(3, 3, (3, 1), padding=(1, 0)))
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        y = self.last(self.norm(self.depthwise(self.conv(x))))
        return self.linear(y.transpose(1, 3)).transpose(1, 3)


def base(seed=0):
    torch.manual_seed(seed)
    return Small().eval()


def expert(rank=2, alpha=3.0, **options):
    """With statistics, norms and adapters off their initial values."""
    network = add_lora(base(), rank, alpha, **options)
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in lora_parameters(network):
            parameter.add_(0.1 * torch.randn_like(parameter))
        network.norm.running_mean.add_(0.3)
    return network.eval()


@torch.no_grad()
def run(network):
    return network(X)


def test_a_file_holds_what_the_expert_has_of_its_own(tmp_path):
    network = expert()
    own = {f"{name}.lora_{x}" for name in ("conv", "depthwise", "last.0", "last.1") for x in "AB"}
    statistics = {f"norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert lora_state(network).keys() == own | statistics | {"norm.weight", "norm.bias"}
    assert lora_state(expert(norms=False)).keys() == own | statistics
    save_lora(network, tmp_path / "a.safetensors")
    assert safetensors.torch.load_file(tmp_path / "a.safetensors").keys() == lora_state(network).keys()
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("norms", [True, False])
def test_what_is_loaded_is_what_was_saved(tmp_path, norms):
    network = expert(norms=norms)
    expected = run(network)
    save_lora(network, tmp_path / "a.safetensors")
    fresh = load_lora(base(), tmp_path / "a.safetensors")
    assert torch.equal(run(fresh), expected) and lora_settings(fresh) == lora_settings(network)
    other = expert(norms=norms, rank=2)
    with torch.no_grad():
        for parameter in lora_parameters(other):
            parameter.mul_(2)
    assert torch.equal(run(load_lora(fold(other), tmp_path / "a.safetensors")), expected)
    assert torch.equal(run(remove_lora(other)), run(base()))


def test_convolutions_that_were_left_out_are_when_loaded(tmp_path):
    save_lora(expert(exclude=("last", "conv")), tmp_path / "a.safetensors")
    assert [name for name, _ in adapters(load_lora(base(), tmp_path / "a.safetensors"))] == ["depthwise"]
    with pytest.raises(CheckpointError, match="6 missing: conv.lora_A, conv.lora_B"):
        load_lora(expert(), tmp_path / "a.safetensors")


def test_statistics_of_another_expert_do_not_stay(tmp_path):
    plain = {name: value for name, value in lora_state(expert()).items() if ".lora_" in name}
    network = load_lora(expert(), plain, alpha=3.0)
    assert torch.equal(network.norm.running_mean, torch.zeros(4)) and torch.equal(network.norm.weight, torch.ones(4))


def test_another_base_is_refused_unless_it_is_of_another_precision(tmp_path):
    save_lora(expert(), tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="was trained on another base than this Small's weights"):
        load_lora(base(seed=1), tmp_path / "a.safetensors")
    load_lora(base().double(), tmp_path / "a.safetensors")


# --- loralib


@pytest.mark.parametrize("whole", [True, False])
def test_loralibs_files_with_and_without_the_base(tmp_path, whole):
    network = expert()
    state = network.state_dict() if whole else {n: v for n, v in network.state_dict().items() if ".lora_" in n}
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="alpha: .*model.pth does not say it"):
        load_lora(base(), tmp_path / "model.pth")
    loaded = load_lora(base(), tmp_path / "model.pth", alpha=3.0)
    expected = run(network) if whole else run(load_lora(base(), state, alpha=3.0))
    assert torch.equal(run(loaded), expected)
    assert lora_settings(loaded).rank == 2 and lora_settings(loaded).norms is whole
    assert torch.equal(loaded.conv.conv.weight, base().conv.weight)
    if whole:
        with pytest.raises(CheckpointError, match="of another base: conv.conv.weight"):
            load_lora(base(seed=1), tmp_path / "model.pth", alpha=3.0)


# --- PEFT


def peft_folder(folder, tensors, **settings):
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "bias": "none", "use_dora": False, "rank_pattern": {}}
    (folder / "adapter_config.json").write_text(json.dumps({**config, **settings}))
    named = {f"base_model.model.{name}.weight": value for name, value in tensors.items()}
    safetensors.torch.save_file(named, folder / "adapter_model.safetensors")
    return folder


def peft_pair(conv, rank=2):
    """A convolution of the kernel's size to ``rank`` channels, and a 1x1 one from these, as PEFT has them."""
    torch.manual_seed(4)
    return torch.randn(rank, *conv.weight.shape[1:]), torch.randn(conv.out_channels, rank, *[1] * len(conv.kernel_size))


@pytest.mark.parametrize("name", ["conv", "last.0", "last.1"])
def test_pefts_adapters_of_dense_convolutions_are_converted_exactly(tmp_path, name):
    network = base().double()
    conv = network.get_submodule(name)
    a, b = peft_pair(conv)
    x = torch.rand(1, conv.in_channels, 9, 8, dtype=torch.float64)
    down = nn.functional.conv2d(x, a.double(), padding=conv.padding)
    expected = conv(x) + 3 / 2 * nn.functional.conv2d(down, b.double())
    folder = peft_folder(tmp_path / "adapter", {f"{name}.lora_A": a, f"{name}.lora_B": b})
    load_lora(network, folder)
    assert [found for found, _ in adapters(network)] == [name]
    assert golden.relative_error(network.get_submodule(name)(x), expected) <= 1e-14
    assert not lora_settings(network).norms


def test_pefts_file_leaves_other_convolutions_as_the_bases(tmp_path):
    a, b = peft_pair(base().conv)
    folder = peft_folder(tmp_path / "adapter", {"conv.lora_A": a, "conv.lora_B": b})
    assert torch.equal(run(load_lora(expert(), folder)), run(load_lora(base(), folder / "adapter_model.safetensors")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "PEFT's LORA with use_dora=True computes something else"),
        ({"use_rslora": True}, "use_rslora=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"rank_pattern": {"conv": 4}}, r"rank_pattern=\{'conv': 4\}"),
        ({"modules_to_save": ["norm"]}, r"modules_to_save=\['norm'\]"),
        ({"peft_type": "LOHA"}, "PEFT's LOHA with this type"),
        ({"r": 4}, r"expected one rank for all convolutions, got \[2.0, 4\]"),
    ],
)
def test_what_peft_computes_otherwise_is_refused(tmp_path, settings, message):
    a, b = peft_pair(base().conv)
    folder = peft_folder(tmp_path / "adapter", {"conv.lora_A": a, "conv.lora_B": b}, **settings)
    network = base()
    with pytest.raises(CheckpointError, match=message):
        load_lora(network, folder)
    assert not adapters(network)


@pytest.mark.parametrize("settings", [{"dilation": 2, "padding": 2}, {"padding": 1, "padding_mode": "reflect"}])
def test_pefts_adapters_know_neither_dilation_nor_padding_modes(tmp_path, settings):
    network = nn.Sequential(nn.Conv2d(3, 4, 3, **settings))
    a, b = peft_pair(network[0])
    with pytest.raises(CheckpointError, match="neither dilation nor other padding than zeros"):
        load_lora(network, peft_folder(tmp_path / "adapter", {"0.lora_A": a, "0.lora_B": b}))


def test_pefts_grouped_and_linear_adapters_are_refused(tmp_path):
    tensors = {"depthwise.lora_A": torch.randn(2, 4, 3, 3), "depthwise.lora_B": torch.randn(4, 1, 1, 1)}
    with pytest.raises(
        CheckpointError, match=r"depthwise.lora_A.weight \(grouped: PEFT's adapter has another formula\)"
    ):
        load_lora(base(), peft_folder(tmp_path / "a", tensors))
    tensors = {"linear.lora_A": torch.randn(2, 3), "linear.lora_B": torch.randn(3, 2)}
    with pytest.raises(CheckpointError, match=r"linear.lora_A.weight \(no convolution here\)"):
        load_lora(base(), peft_folder(tmp_path / "b", tensors))
    (tmp_path / "b" / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match="there is no adapter_config.json beside it"):
        load_lora(base(), tmp_path / "b")


# --- bad input


def test_all_that_does_not_fit_is_told_at_once(tmp_path):
    network = expert()
    state = {name: value for name, value in lora_state(network).items() if name != "depthwise.lora_A"}
    state["conv.lora_B"] = state["conv.lora_B"][1:]
    state["head.lora_A"] = torch.ones(2, 2)
    fresh = base()
    with pytest.raises(CheckpointError) as error:
        load_lora(fresh, state, alpha=3.0)
    assert "1 missing: depthwise.lora_A" in str(error.value)
    assert "head.lora_A" in str(error.value) and "unexpected" in str(error.value)
    assert "conv.lora_B (expected [12, 6], got [11, 6])" in str(error.value)
    assert not adapters(fresh)


def test_files_that_say_something_else(tmp_path):
    network = expert()
    save_lora(network, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"alpha: .* says 3.0, got 4"):
        load_lora(base(), tmp_path / "a.safetensors", alpha=4)
    with pytest.raises(CheckpointError, match="has rank 2 and alpha 3, the network's LoRA has rank 1 and alpha 16"):
        load_lora(add_lora(base(), 1), tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="holds no lora_A of a convolution of this network, but"):
        load_lora(base(), base().state_dict(), alpha=1)
    with pytest.raises(FileNotFoundError):
        load_lora(base(), tmp_path / "b.safetensors")
    (tmp_path / "c.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_lora(base(), tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="must end in .safetensors"):
        save_lora(network, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="it is folded; unfold it first"):
        save_lora(fold(network), tmp_path / "d.safetensors")
    with pytest.raises(ValueError, match="it has no LoRA"):
        save_lora(base(), tmp_path / "d.safetensors")
    assert not (tmp_path / "d.safetensors").exists()
