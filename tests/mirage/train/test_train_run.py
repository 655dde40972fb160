"""The loop: resuming, what is not finite, the reference beside the fast modules, schedules, the average, logs."""

from __future__ import annotations

import csv
import itertools
import math
import os
import signal
import threading

import numpy as np
import pytest
import torch
from train_cases import settings, write_pictures

import mirage
from mirage.checkpoint import CheckpointError
from mirage.train import Interrupted, Run, load_config, read_state
from mirage.train.config import Schedule
from mirage.train.data import batches
from mirage.train.schedule import Rates
from mirage.train.state import checkpoints

pytest.importorskip("lightning_fabric", reason="the extra [train] is not installed")


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def root(tmp_path):
    write_pictures(tmp_path / "clean")
    return tmp_path


def trained(root, *overrides, out="run"):
    run = Run(settings(root, *overrides, out=out))
    run.train()
    return run


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


# --- resuming


@pytest.mark.parametrize(
    "more", [(), ("data.workers=2",), ("trainer.accumulate=2",)], ids=["plain", "workers", "passes"]
)
def test_interrupt_and_resume_gives_the_same_weights_bit_for_bit(root, more):
    more = ("trainer.ema=0.9", "schedule.kind=wsd", *more)
    whole = trained(root, *more, out="whole")
    first = trained(root, *more, "schedule.steps=2", out="parts")
    assert first.step == 2 and first.resumed is None
    resumed = trained(root, *more, out="parts")
    assert resumed.resumed is not None and resumed.step == whole.step == 6
    assert same(whole.network.state_dict(), resumed.network.state_dict())
    assert same(whole.average.module.state_dict(), resumed.average.module.state_dict())
    for a, b in zip(*(run.optimizer.state_dict()["state"].values() for run in (whole, resumed)), strict=True):
        assert same(a, b)
    assert not same(first.network.state_dict(), whole.network.state_dict())


def test_a_signal_saves_at_the_end_of_the_step_and_training_goes_on_from_there(root):
    constant = ("schedule.kind=wsd", "schedule.steps=30")
    run = Run(settings(root, *constant, out="stopped"))
    original, done = run._step, []

    def step(parts):
        done.append(run.step)
        if len(done) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(parts)

    run._step = step
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="stopped at step 2"):
        run.train()
    assert signal.getsignal(signal.SIGTERM) is before
    assert [p.name for p in checkpoints(root / "stopped")] == ["step-00000002.ckpt"]
    resumed = trained(root, *constant, out="stopped")
    assert same(resumed.network.state_dict(), trained(root, *constant, out="whole").network.state_dict())


def test_training_outside_the_main_thread_leaves_signals_alone(root):
    run, before = Run(settings(root, "schedule.steps=1")), signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=run.train)
    thread.start()
    thread.join()
    assert run.step == 1 and signal.getsignal(signal.SIGINT) is before


def test_a_truncated_checkpoint_is_refused_and_the_message_says_what_to_do(root):
    trained(root, "output.checkpoint_steps=3")
    older, newest = checkpoints(root / "run")
    newest.write_bytes(newest.read_bytes()[:-1000])
    with pytest.raises(
        CheckpointError, match=r"step-00000006.ckpt: damaged.*delete it to go on from step-00000003.ckpt"
    ):
        Run(settings(root))
    newest.unlink()
    older.write_bytes(older.read_bytes()[: older.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=r"step-00000003.ckpt: damaged.*delete it to start anew"):
        Run(settings(root))


def test_a_checkpoint_of_another_network_is_refused(root):
    trained(root, "schedule.steps=1")
    with pytest.raises(CheckpointError, match="step-00000001.ckpt does not fit MIRAGE:\n.*mis-shaped"):
        Run(settings(root, "model.arguments.dim=12"))


def test_the_last_checkpoints_are_kept_and_no_temporary_file(root):
    trained(root, "output.checkpoint_steps=1", "output.keep=2")
    assert sorted(p.name for p in (root / "run").glob("*.ckpt")) == ["step-00000005.ckpt", "step-00000006.ckpt"]
    assert not [p for p in (root / "run").iterdir() if p.suffix == ".tmp"]


def test_a_resumed_run_may_have_another_batch_and_goes_on_in_the_data(root):
    trained(root, "schedule.steps=3", "schedule.kind=wsd")
    resumed = Run(settings(root, "data.batch=4", "schedule.kind=wsd"))
    assert resumed.samples == 6 and resumed.changes == ["schedule.steps: 3 -> 6", "data.batch: 2 -> 4"]
    resumed.train()
    assert resumed.samples == 6 + 3 * 4 and read_state(checkpoints(root / "run")[-1]).samples == 18


def test_logs_of_an_interrupted_run_have_each_step_once(root):
    trained(root, "schedule.steps=4", "schedule.kind=wsd", "output.checkpoint_steps=2")
    checkpoints(root / "run")[-1].unlink()  # as if it had died after step 4 was logged and before it was saved
    trained(root, "schedule.kind=wsd")
    assert [int(row["step"]) for row in rows(root / "run" / "train.csv")] == [1, 2, 3, 4, 5, 6]


# --- what is trained


def test_sixty_steps_with_the_reference_and_the_fast_modules_agree(root):
    """From one seed, stochastic depth and all losses on: the curves, and the pictures that the networks restore."""
    curves, networks = [], []
    for fast in ("false", "true"):
        out = f"fast-{fast}"
        run = trained(root, f"model.fast={fast}", "schedule.steps=60", out=out)
        curves.append([float(row["loss"]) for row in rows(root / out / "train.csv")])
        networks.append(run.network.eval())
    reference, fast = (np.array(curve) for curve in curves)
    assert len(reference) == 60 and reference[-10:].mean() < 0.8 * reference[:10].mean()  # it learns
    np.testing.assert_allclose(fast, reference, rtol=2e-3)
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = (network(x) for network in networks)
    assert (a - b).abs().max() < 5e-3


def test_passes_give_the_gradient_of_their_mean(root):
    """Two passes of one sample each against one of two, without what depends on the batch: batch norm and contrast."""
    curves = []
    for passes in (1, 2):
        run = Run(
            settings(root, f"trainer.accumulate={passes}", "model.spd=false", "model.drop_path=0", out=f"{passes}")
        )
        run.network.eval()  # whose statistics are not the batch's
        stream = batches(run.data, 0, 6, passes)
        curves.append([run._step(list(itertools.islice(stream, passes))) for _ in range(6)])
    for one, two in zip(*curves, strict=True):
        assert two == pytest.approx(one, rel=1e-3)
    assert curves[0][5]["loss"] != curves[0][0]["loss"]


def test_without_the_contrastive_term_the_head_does_not_train(root):
    run = Run(settings(root, "loss.contrastive_weight=0"))
    head = [name for name, p in run.network.named_parameters() if not p.requires_grad]
    assert head == [
        n for n, _ in run.network.named_parameters() if n.startswith(("reduce_shallow", "reduce_latent", "spd"))
    ]
    assert len(head) == 8
    before = {name: value.clone() for name, value in run.network.state_dict().items()}
    run.train()
    after = run.network.state_dict()
    assert all(torch.equal(after[name], before[name]) == (name in head) for name, _ in run.network.named_parameters())


def test_bfloat16_autocast_learns_as_float32_does(root):
    curves = []
    for precision in ("32-true", "bf16-mixed"):
        trained(root, f"trainer.precision={precision}", "schedule.steps=10", out=precision)
        curves.append([float(row["loss"]) for row in rows(root / precision / "train.csv")])
    np.testing.assert_allclose(curves[1], curves[0], rtol=0.03)
    assert curves[0] != curves[1]
    state = read_state(checkpoints(root / "bf16-mixed")[-1])
    assert {value.dtype for name, value in state.network.items() if "num_batches" not in name} == {torch.float32}


def test_the_network_of_a_file_with_several_is_named(root):
    networks = [mirage.mirage_tiny(**settings(root).model.arguments).state_dict() for _ in range(2)]
    torch.save({"first": networks[0], "second": networks[1]}, root / "two.pth")
    with pytest.raises(CheckpointError, match="(?s)first.*second"):
        Run(settings(root, f"model.weights={root / 'two.pth'}"))
    run = Run(settings(root, f"model.weights={root / 'two.pth'}", "model.key=second"))
    assert same(run.network.state_dict(), networks[1])


def test_training_starts_from_weights(root):
    other = mirage.mirage_tiny(**settings(root).model.arguments)
    mirage.save_checkpoint(other, root / "start.safetensors")
    run = Run(settings(root, f"model.weights={root / 'start.safetensors'}"))
    assert same(run.network.state_dict(), other.state_dict())


def test_the_average_follows_the_weights(root):
    """Decay min(0.5, (1 + n) / (10 + n)) over the weights of every step, which a fast learning rate sets apart."""
    run = Run(settings(root, "trainer.ema=0.5", "optimizer.lr=1e-2"))
    name = "encoder_level1.0.attn.gatedcnn.norm.running_mean"
    expected, original = {}, run._step

    def step(parts):
        result = original(parts)
        for key in ("output.weight", name):
            now = run.network.state_dict()[key].clone()
            n = run.step
            decay = 0 if n == 1 else min(0.5, (1 + n) / (10 + n))
            expected[key] = now if n == 1 else expected[key] * decay + now * (1 - decay)
        return result

    run._step = step
    run.train()
    state = run.average.module.state_dict()
    for key, value in expected.items():
        torch.testing.assert_close(state[key], value, rtol=1e-5, atol=1e-7)
        assert not torch.equal(value, run.network.state_dict()[key])


# --- what is not finite


def poison(run, at, value=float("nan")):
    """The samples of one step get a pixel that is no number."""
    original = run._step

    def step(parts):
        if run.step == at:
            parts[0].degraded[0, 0, 0, 0] = value
        return original(parts)

    run._step = step
    return run


def test_a_loss_that_is_no_number_stops_and_names_the_batch(root):
    run = poison(Run(settings(root)), at=3)
    names = run.data[6].name, run.data[7].name
    with pytest.raises(FloatingPointError, match="step 3: not finite") as caught:
        run.train()
    assert all(name in str(caught.value) for name in names)
    assert not checkpoints(root / "run")


def test_or_the_step_is_skipped_and_nothing_of_it_stays(root, capsys):
    run = Run(settings(root, "trainer.on_nan=skip", "trainer.ema=0.9"))
    before = {}
    original = run._step

    def step(parts):
        if run.step == 3:
            parts[0].degraded[0, 0, 0, 0] = float("nan")
            before.update({name: value.clone() for name, value in run.network.state_dict().items()})
            before_average = {name: value.clone() for name, value in run.average.module.state_dict().items()}
            result = original(parts)
            assert same(before, run.network.state_dict())
            assert same(before_average, run.average.module.state_dict())
            return result
        return original(parts)

    run._step = step
    run.train()
    assert before and run.step == 6
    assert all(bool(torch.isfinite(value).all()) for value in run.network.state_dict().values())
    out = capsys.readouterr().out
    assert "skipped step 3: not finite" in out and run.data[6].name in out


def test_a_gradient_that_overflows_counts_as_not_finite(root):
    run = Run(settings(root))
    run.network.output.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(FloatingPointError, match="gradient (nan|inf)"):
        run.train()


# --- schedules


def test_rates_of_warm_up_constant_and_decay():
    rates = Rates(Schedule(kind="wsd", steps=20, warmup=4, decay_from=10, final_lr=0.1), lr=1.0, steps_per_epoch=5)
    assert [rates.at(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates.at(9) == rates.at(10) == 1.0
    assert rates.at(15) == pytest.approx(0.55) and rates.at(20) == rates.at(30) == pytest.approx(0.1)
    constant = Rates(Schedule(kind="wsd", steps=20, warmup=4), lr=1.0, steps_per_epoch=5)
    assert constant.at(19) == 1.0


def test_rates_of_the_paper_fall_along_a_cosine_to_the_end():
    rates = Rates(Schedule(epochs=120), lr=2e-4, steps_per_epoch=10.5)
    assert rates.steps == 1260
    assert (
        rates.at(0) == 2e-4 and rates.at(630) == pytest.approx(1e-4) and rates.at(1260) == pytest.approx(0, abs=1e-12)
    )


def test_rates_of_the_released_code_change_by_epoch():
    """Its scheduler's closed form, of the epoch before; test_train_released.py asks that code itself."""
    schedule = load_config("3deg-tiny-released").schedule
    rates = Rates(schedule, lr=2e-4, steps_per_epoch=7)
    assert rates.steps == 130 * 7
    for epoch in (0, 1, 2, 14, 15, 16, 60, 129):
        before = max(0, epoch - 1)
        if before < 15:
            expected = 2e-4 * before / 14
        else:
            expected = 2e-4 / 2 * (1 + math.cos(math.pi * (before - 15) / 135))
        assert rates.at(7 * epoch) == rates.at(7 * epoch + 6) == pytest.approx(expected, abs=1e-12)


# --- what is told


def test_validation_measures_both_networks_at_fixed_noise(root):
    run = Run(
        settings(root, "data.hold_out=1", "data.validation_crop=16", "trainer.ema=0.9", "output.validate_steps=3")
    )
    run.train()
    found = rows(root / "run" / "validation.csv")
    assert [row["step"] for row in found] == ["3", "6"]
    expected = {f"noise_{sigma}{which}" for sigma in (15, 25, 50) for which in ("", "_ema")}
    assert set(found[0]) == {"step", "seconds", *expected}
    (sample,) = [sample for measure, sample in run.validation if measure == "noise_25"]
    with torch.no_grad():
        restored = run.network.eval()(sample.degraded[None])[0].clamp(0, 1)
    mse = float((restored - sample.clean).double().square().mean())
    assert float(found[1]["noise_25"]) == pytest.approx(-10 * math.log10(mse), abs=1e-3)
    assert {pair.name for pair in run.data.pairs}.isdisjoint(pair.name for pair in run.data.held_out)


def test_tensorboard_has_the_same_curve(root):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained(root, "output.tensorboard=true")
    events = EventAccumulator(str(root / "run" / "tensorboard")).Reload()
    curve = [event.value for event in events.Scalars("train/loss")]
    assert curve == pytest.approx([float(row["loss"]) for row in rows(root / "run" / "train.csv")], rel=1e-5)
