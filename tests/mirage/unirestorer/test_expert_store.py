"""The store of experts: what each image gets, what is in memory, what lies in files."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import golden
import pytest
import torch
from golden import relative_error
from torch import nn

import mirage.fast
from mirage import networks
from mirage.checkpoint import CheckpointError
from mirage.restore.pixels import pad_to_multiple
from mirage.unirestorer import ExpertStore, add_lora, fold, lora_parameters, save_lora, store_files
from mirage.unirestorer.store import _run

GENERATOR = torch.Generator().manual_seed(2)
BATCH = torch.rand(6, 3, 16, 24, generator=GENERATOR)


def base(seed=0, levels=0):
    torch.manual_seed(seed)
    sizes = {"encoder_blocks": [0] * levels, "decoder_blocks": [0] * levels}
    network = networks.create("nafnet", width=4 if levels == 0 else 16, middle_blocks=1, **sizes).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) * (not name.startswith("ending")))
    return network


def expert(seed, of=None):
    """The base with LoRA of which everything was trained."""
    network = add_lora(base() if of is None else of, 2, 4.0)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in lora_parameters(network):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


def filled(**options):
    """Experts a, b and c with LoRA, the root, and a network of its own."""
    store = ExpertStore(base(), **options)
    store.add("root")
    for seed, name in enumerate("abc", start=1):
        store.add(name, expert(seed))
    store.add("own", base(seed=9))
    return store


PLAIN = {"root": base(), "a": fold(expert(1)), "b": fold(expert(2)), "c": fold(expert(3)), "own": base(seed=9)}
ALONE = {name: mirage.fast.accelerate(network) for name, network in PLAIN.items()}
NAMES = ["b", "root", "b", "own", "a", "c"]
BYTES = sum(value.numel() * value.element_size() for value in base().state_dict().values())


@torch.no_grad()
def alone(name, image):
    """What an expert makes of one image, without a store."""
    height, width = image.shape[1:]
    return ALONE[name](pad_to_multiple(image[None]))[0, :, :height, :width]


# --- restoring


@pytest.mark.parametrize("memory", [None, BYTES, 2 * BYTES, 1])
def test_each_image_gets_its_expert_whatever_the_budget(memory):
    store = filled(memory=memory)
    for names in (NAMES, NAMES[::-1], NAMES):
        restored = store.restore(BATCH, names)
        assert restored.shape == BATCH.shape and not restored.requires_grad
        for image, name, result in zip(BATCH, names, restored, strict=True):
            assert relative_error(result, alone(name, image)) <= 4e-7


def test_an_expert_has_the_bits_of_the_folded_network_however_often_others_were_there():
    store = filled(memory=1)
    for name in ("a", "root", "b", "a", "c", "root"):
        assert torch.equal(store.restore([BATCH[0]], [name])[0], alone(name, BATCH[0])), name
        with store.network(name) as network:
            expected = ALONE[name].state_dict()
            assert all(torch.equal(value, expected[key]) for key, value in network.state_dict().items())


def test_each_expert_runs_once_for_a_batch_and_those_in_memory_first(monkeypatch):
    store = filled()
    store.restore(BATCH[:1], ["c"])
    calls = []

    def counted(network, images):
        calls.append(len(images))
        handle = network.register_forward_hook(lambda *_: calls.append("once"))
        try:
            return _run(network, images)
        finally:
            handle.remove()

    monkeypatch.setattr("mirage.unirestorer.store._run", counted)
    store.restore(BATCH, NAMES)
    assert calls == [1, "once", 2, "once", 1, "once", 1, "once", 1, "once"]
    assert store.loaded[-3:] == ("b", "root", "a") and store.loaded[0] == "c"


def test_images_of_mixed_sizes_are_padded_once_and_come_back_in_order():
    sizes = [(16, 24), (3, 5), (13, 24), (8, 8), (17, 30), (16, 24), (1, 1)]
    images = [torch.rand(3, *size, generator=GENERATOR) for size in sizes]
    names = ["a", "b", "a", "root", "b", "a", "own"]
    restored = filled(memory=1).restore(images, names)
    assert isinstance(restored, list)
    for image, name, result in zip(images, names, restored, strict=True):
        assert result.shape == image.shape
        assert relative_error(result, alone(name, image)) <= 4e-7


def test_networks_that_need_more_than_multiples_of_8_are_given_them():
    store = ExpertStore(base(levels=4))
    store.add("root")
    sizes = []
    with store.network("root") as network:
        network.intro.register_forward_hook(lambda _m, inputs, _o: sizes.append(tuple(inputs[0].shape[2:])))
        (restored,) = store.restore([torch.rand(3, 20, 9)], ["root"])
    assert sizes == [(32, 16)] and restored.shape == (3, 20, 9)


def test_dtypes_and_modes_of_the_caller():
    store = filled()
    with torch.inference_mode():
        expected = store.restore(BATCH, NAMES)
    assert torch.equal(store.restore(BATCH, NAMES), expected)
    store = filled(memory=1)
    with torch.inference_mode():
        store.restore(BATCH, NAMES)
    assert torch.equal(store.restore(BATCH, NAMES), expected)
    assert store.restore(BATCH.double(), NAMES).dtype == torch.float64
    assert store.restore(BATCH[:0], []).shape == (0, 3, 16, 24) and store.restore([], []) == []


def test_a_gate_has_its_gradient_and_experts_have_none():
    store = filled()
    gate = torch.rand(6, 1, 1, 1, requires_grad=True)
    (store.restore(BATCH, NAMES) * gate / gate.detach()).sum().backward()
    assert gate.grad.abs().min() > 0
    with store.network("a") as network:
        assert not any(parameter.requires_grad for parameter in network.parameters())


def test_the_base_and_what_was_added_may_change_afterwards():
    network, trained = base(), expert(1)
    store = ExpertStore(network)
    store.add("root")
    store.add("a", trained)
    with torch.no_grad():
        for parameter in (*network.parameters(), *trained.parameters()):
            parameter.zero_()
    for name in ("root", "a"):
        assert torch.equal(store.restore(BATCH[:1], [name])[0], alone(name, BATCH[0]))


def test_experts_of_mirage_run_on_the_fast_modules():
    network = golden.load_golden_weights(golden.mirage_mini()).eval()
    trained = expert(1, of=golden.load_golden_weights(golden.mirage_mini()))
    plain = golden.mirage_mini().eval()
    store = ExpertStore(network)
    store.add("a", trained)
    plain.load_state_dict(fold(trained).state_dict())
    with store.network("a") as fast:
        summary = mirage.fast.summary(fast)
        assert isinstance(fast, mirage.fast.MIRAGE) and not summary.called and not summary.kept
    with torch.no_grad():
        expected = mirage.fast.accelerate(plain)(BATCH[:2])
    assert torch.equal(store.restore(BATCH[:2], ["a", "a"]), expected)
    assert type(network) is mirage.MIRAGE and "a" in store and len(store) == 1


# --- memory


def test_the_budget_holds_as_many_as_fit_and_the_oldest_goes():
    store = filled(memory=2 * BYTES)
    assert store.loaded == () and store.loaded_bytes == BYTES
    store.restore(BATCH[:2], ["a", "b"])
    assert store.loaded == ("a", "b") and store.loaded_bytes == 2 * BYTES
    store.restore(BATCH[:1], ["a"])
    store.restore(BATCH[:1], ["c"])
    assert store.loaded == ("a", "c") and store.loaded_bytes == 2 * BYTES


def test_the_memory_of_one_goes_to_the_next():
    store = filled(memory=BYTES)
    places = set()
    for name in ("a", "b", "root", "c"):
        with store.network(name) as network:
            places.add(network.intro.weight.data_ptr())
            assert store.loaded == (name,) and store.loaded_bytes == BYTES
    assert len(places) == 1


def test_what_runs_stays_and_the_budget_is_kept_afterwards():
    store = filled(memory=1)
    with store.network("a") as first:
        weight = first.intro.weight.clone()
        with store.network("b") as second, store.network("a") as again:
            assert again is first and second is not first
        assert torch.equal(first.intro.weight, weight) and store.loaded == ("a",)
    assert store.loaded_bytes == BYTES


def test_networks_of_their_own_from_files_count_and_go(tmp_path):
    networks.save(base(seed=9), tmp_path / "own.safetensors")
    store = ExpertStore(base(), memory=2 * BYTES)
    store.add("own", tmp_path / "own.safetensors")
    store.add("a", expert(1))
    store.add("b", expert(2))
    for names in (["own"], ["a", "b"], ["own", "a"], ["own"]):
        restored = store.restore(BATCH[: len(names)], names)
        assert store.loaded_bytes <= 2 * BYTES and store.kind("own") == "full"
        for image, name, result in zip(BATCH, names, restored, strict=False):
            assert torch.equal(result, alone(name, image))


def test_threads_at_once_get_what_they_get_one_after_the_other():
    store = filled(memory=1)
    expected = {name: store.restore(BATCH[:1], [name]) for name in ("root", "a", "b", "c")}
    start = threading.Barrier(4)

    def work(shift):
        start.wait()
        names = [list(expected)[(shift + i) % 4] for i in range(12)]
        return all(torch.equal(store.restore(BATCH[:1], [name]), expected[name]) for name in names)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
    assert store.loaded_bytes == BYTES and len(store.loaded) == 1


# --- files


def test_a_store_survives_saving(tmp_path):
    store = filled()
    store.save(tmp_path / "experts")
    loaded = ExpertStore.load(tmp_path / "experts", memory="1K")
    assert loaded.names == store.names == ("root", "a", "b", "c", "own")
    assert [loaded.kind(name) for name in loaded.names] == ["base", "lora", "lora", "lora", "full"]
    assert torch.equal(loaded.restore(BATCH, NAMES), store.restore(BATCH, NAMES))
    loaded.save(tmp_path / "again")
    first, second = ({path.name for path in (tmp_path / name).iterdir()} for name in ("experts", "again"))
    assert first == second and len(first) == 6 and "experts.json" in first
    assert ExpertStore.load(tmp_path / "again").restore(BATCH, NAMES).equal(store.restore(BATCH, NAMES))


def test_a_file_of_save_lora_is_an_expert(tmp_path):
    save_lora(expert(2), tmp_path / "b.safetensors")
    store = ExpertStore(base())
    store.add("b", tmp_path / "b.safetensors")
    assert store.kind("b") == "lora" and torch.equal(store.restore(BATCH[:1], ["b"])[0], alone("b", BATCH[0]))
    with pytest.raises(CheckpointError, match="expert b: was trained on another base"):
        ExpertStore(base(seed=1)).add("b", tmp_path / "b.safetensors")


def test_saving_replaces_a_store_whole_and_tidies_up(tmp_path):
    filled().save(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    before = {path.name for path in tmp_path.iterdir()}
    store = ExpertStore(base())
    store.add("a", expert(1))
    store.save(tmp_path)
    after = {path.name for path in tmp_path.iterdir()}
    assert after < before and len(after) == 4 and "notes.txt" in after
    assert ExpertStore.load(tmp_path).names == ("a",)


def test_saving_that_fails_leaves_the_store_that_was_there(tmp_path, monkeypatch):
    filled().save(tmp_path)
    expected = filled().restore(BATCH, NAMES)
    other = ExpertStore(base(seed=5))
    other.add("a", expert(7, of=base(seed=5)))
    write = store_files.write_whole

    def fails(path, data):
        if path.name == "experts.json":
            raise OSError("disk full")
        write(path, data)

    monkeypatch.setattr(store_files, "write_whole", fails)
    with pytest.raises(OSError, match="disk full"):
        other.save(tmp_path)
    assert torch.equal(ExpertStore.load(tmp_path).restore(BATCH, NAMES), expected)


def test_files_that_change_or_go_are_refused_and_the_store_goes_on(tmp_path):
    filled().save(tmp_path)
    store = ExpertStore.load(tmp_path, memory=1)
    (path,) = tmp_path.glob("a-*.safetensors")
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"\0")
    with pytest.raises(CheckpointError, match="has changed or gone since it was first read"):
        store.restore(BATCH[:1], ["a"])
    path.unlink()
    with pytest.raises(CheckpointError, match="has changed or gone"):
        store.restore(BATCH[:1], ["a"])
    for name in ("b", "root"):
        assert torch.equal(store.restore(BATCH[:1], [name])[0], alone(name, BATCH[0]))
    with pytest.raises(FileNotFoundError, match="names a-.*safetensors, which is not there"):
        ExpertStore.load(tmp_path)


def test_an_expert_that_fails_on_the_way_is_not_there(tmp_path, monkeypatch):
    filled().save(tmp_path)
    store = ExpertStore.load(tmp_path, memory=1)
    store.restore(BATCH[:1], ["a"])
    with monkeypatch.context() as patch:
        patch.setattr("mirage.unirestorer.store.add_low_rank", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            store.restore(BATCH[:1], ["b"])
        assert store.loaded == ()
    for name in ("b", "a"):
        assert torch.equal(store.restore(BATCH[:1], [name])[0], alone(name, BATCH[0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(format="x"), "expected the format"),
        (lambda content: content.pop("base"), "KeyError"),
        (lambda content: content.update(base="../base.safetensors"), "expected the name of a file in the folder"),
        (lambda content: content["experts"]["a"].update(kind="half"), "kind: expected one of base, lora, full"),
        (lambda content: content["experts"]["a"].update(file=content["base"]), "it has no rank and alpha"),
    ],
)
def test_folders_that_hold_something_else(tmp_path, change, message):
    store = ExpertStore(base())
    store.add("a", expert(1))
    store.save(tmp_path)
    content = json.loads((tmp_path / "experts.json").read_text())
    change(content)
    (tmp_path / "experts.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        ExpertStore.load(tmp_path)


def test_modules_of_no_known_class_stay_in_memory(tmp_path):
    store = ExpertStore(base())
    store.add("conv", nn.Conv2d(3, 3, 3, padding=1))
    assert store.restore(BATCH[:1], ["conv"]).shape == (1, 3, 16, 24) and store.loaded == ()
    with pytest.raises(ValueError, match="expert conv: expected one of mirage, nafnet, .* got Conv2d"):
        store.save(tmp_path)
    assert not (tmp_path / "experts.json").exists()


# --- bad input


@pytest.mark.parametrize("name", ["", "a/b", "-a", ".", "ä", 3])
def test_names_that_no_file_can_have(name):
    with pytest.raises(ValueError, match="name: expected letters, digits"):
        ExpertStore(base()).add(name)


def test_experts_that_are_no_use(tmp_path):
    store = filled()
    with pytest.raises(ValueError, match="name: 'a' is there already"):
        store.add("a")
    with pytest.raises(CheckpointError, match="expert d: was trained on another base"):
        store.add("d", expert(1, of=base(seed=1)))
    with pytest.raises(ValueError, match="it is folded"):
        store.add("d", fold(expert(1)))
    with pytest.raises(FileNotFoundError, match="no file of weights at"):
        store.add("d", tmp_path / "d.safetensors")
    other = add_lora(nn.Sequential(nn.Conv2d(3, 3, 1)), 2)
    with pytest.raises(CheckpointError, match="expert d"):
        store.add("d", other)
    assert "d" not in store and len(store) == 5
    with pytest.raises(ValueError, match="base: expected a network without LoRA"):
        ExpertStore(expert(1))
    with pytest.raises(TypeError, match="base: expected a torch.nn.Module, got str"):
        ExpertStore("base.safetensors")
    with pytest.raises(ValueError, match="memory: expected bytes such as 2G"):
        ExpertStore(base(), memory="much")
    with pytest.raises(FileNotFoundError, match="it has no experts.json"):
        ExpertStore.load(tmp_path)


@pytest.mark.parametrize(
    ("images", "names", "kind", "message"),
    [
        (BATCH[:2], ["a"], ValueError, "experts: expected one for each of 2 images, got 1"),
        (BATCH[:1], ["z"], ValueError, "expert: expected one of root, a, b, c, own, got 'z'"),
        (BATCH[0], ["a"] * 3, ValueError, r"images: expected \[N, C, H, W\], got \[3, 16, 24\]"),
        ([BATCH[0][0]], ["a"], ValueError, r"images: expected \[C, H, W\] each, not empty, got \[16, 24\]"),
        ([BATCH[0][:, :0]], ["a"], ValueError, "not empty, got"),
        ([BATCH[0].byte()], ["a"], TypeError, "floating-point numbers, got torch.uint8"),
        (["a.png"], ["a"], TypeError, "floating-point numbers, got str"),
    ],
)
def test_images_that_are_none(images, names, kind, message):
    with pytest.raises(kind, match=message):
        filled().restore(images, names)


def test_an_expert_that_returns_something_else_is_told():
    store = ExpertStore(base())
    store.add("half", nn.Conv2d(3, 3, 2, 2))
    with pytest.raises(ValueError, match=r"expert: expected images of shape \[1, 3, 16, 24\] .* got \[1, 3, 8, 12\]"):
        store.restore(BATCH[:1], ["half"])
