"""The mirage command, and what mirage doctor finds."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import mirage
import mirage_kernels
from mirage import doctor, self_check
from mirage.cli import main
from mirage.images import ImageFile, read_image, write_image
from mirage_kernels._runtime.cases import REGISTERED, operators


def call(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    mirage.save_checkpoint(mirage.mirage_tiny(), path)
    return path


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 1 << 16, (9, 17, 3), dtype=np.uint16)
    write_image(tmp_path / "photo.png", ImageFile(pixels))
    return tmp_path / "photo.png"


def test_help_lists_the_commands():
    result = call("--help")
    assert result.exit_code == 0
    assert all(name in result.output for name in ("table6", "restore", "doctor", "tune", "version"))
    for name in ("table6", "restore", "doctor", "tune", "version"):
        assert call(name, "-h").exit_code == 0


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from click.testing import CliRunner; from mirage.cli import main; "
        "CliRunner().invoke(main, ['table6', '--help']); "
        "print([m for m in ('matplotlib', 'skimage', 'rich.table', 'imagecodecs', 'triton') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_version():
    result = call("version")
    assert result.exit_code == 0
    assert torch.__version__ in result.output and "mirage-kernels" in result.output


def test_python_runs_the_package_as_the_command():
    done = subprocess.run([sys.executable, "-m", "mirage", "version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == call("version").output, done.stderr
    wrong = subprocess.run([sys.executable, "-m", "mirage", "nothing"], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.startswith("Usage: mirage [OPTIONS]"), wrong.stderr


# --- restore


@pytest.mark.parametrize("which", ["--reference", "--fast"])
def test_restore(weights, photo, tmp_path, which):
    result = call("restore", photo, "--weights", weights, "-o", tmp_path / "out", "--device", "cpu", which)
    assert result.exit_code == 0, result.output
    assert "restored 1 of 1" in result.output
    restored = read_image(tmp_path / "out" / "photo.png").pixels
    assert restored.dtype == np.uint16 and restored.shape == (9, 17, 3)
    with torch.inference_mode():
        x = torch.from_numpy(read_image(photo).pixels.astype(np.float32) / 65535).permute(2, 0, 1)[None]
        x = torch.nn.functional.pad(x, (0, 7, 0, 7), mode="reflect")
        expected = mirage.from_checkpoint(weights)(x)[0, :, :9, :17].clamp(0, 1).permute(1, 2, 0) * 65535
    assert np.abs(restored - expected.numpy()).max() < 8  # of 65535: fp32 and rounding


def test_restore_goes_on_after_a_bad_file(weights, photo, tmp_path):
    (tmp_path / "bad.png").write_bytes(photo.read_bytes()[:100])
    arguments = ["--weights", weights, "-o", tmp_path / "out", "--reference", "--device", "cpu"]
    result = call("restore", tmp_path / "bad.png", photo, tmp_path / "missing.png", *arguments)
    assert result.exit_code == 1
    assert "restored 1 of 3" in result.output
    messages = " ".join(result.stderr.split())
    assert "bad.png: broken PNG" in messages and "missing.png: no such file" in messages
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["photo.png"]


def test_restore_refuses_bad_weights(photo, tmp_path):
    (tmp_path / "w.pth").write_bytes(b"not a checkpoint")
    for name in ("w.pth", "missing.pth"):
        result = call("restore", photo, "--weights", tmp_path / name, "-o", tmp_path / "out")
        assert result.exit_code == 1 and name in result.output and not (tmp_path / "out").exists()


def test_the_name_of_bad_weights_is_printed_once(photo, tmp_path):
    (tmp_path / "w.pth").write_bytes(b"not a checkpoint")
    path = tmp_path / "whole.pth"
    torch.save(mirage.mirage_tiny(), path)
    for arguments in (("restore", photo, "-o", tmp_path / "out"), ("export", tmp_path / "out.safetensors")):
        result = call(*arguments, "--weights", path)
        assert result.exit_code == 1 and result.stderr.startswith(f"Error: {path}: holds other objects")
        assert result.stderr.count(f"{path}: ") == 1
        result = call(*arguments, "--weights", tmp_path / "w.pth")
        assert result.exit_code == 1 and result.stderr.count("w.pth") == 1
        result = call(*arguments, "--weights", tmp_path / "missing.pth")
        assert result.exit_code == 1 and result.stderr.count("missing.pth") == 1


def test_key_says_which_network_is_meant(photo, tmp_path):
    first, second = mirage.mirage_tiny(), mirage.mirage_tiny()
    output, path = tmp_path / "out.safetensors", tmp_path / "w.pth"
    torch.save({"params": first.state_dict(), "params_ema": second.state_dict()}, path)

    def exported(*arguments):
        result = call("export", output, "--weights", path, *arguments)
        assert result.exit_code == 0
        return result.stderr, mirage.from_checkpoint(output).output.weight

    said, weight = exported()
    assert said.startswith(f"Warning: {path}: holds averaged weights (EMA) at 'params_ema'") and said.count("\n") == 1
    assert torch.equal(weight, second.output.weight)
    said, weight = exported("--key", "params")
    assert said == "" and torch.equal(weight, first.output.weight)
    torch.save({"a": first.state_dict(), "b": second.state_dict()}, path)
    arguments = ("restore", photo, "--weights", path, "-o", tmp_path / "out", "--device", "cpu", "--reference")
    result = call(*arguments)
    assert result.exit_code == 1 and "key='a'" in result.stderr and "--key on the command line" in result.stderr
    assert call(*arguments, "--key", "b").exit_code == 0
    expected = mirage.restore.restore_array(second.eval(), read_image(photo).pixels)
    assert np.array_equal(read_image(tmp_path / "out" / "photo.png").pixels, expected)


def test_usage_errors(photo, weights, tmp_path):
    assert call("restore", "--weights", weights, "-o", tmp_path / "o").exit_code == 2  # no input
    assert call("restore", photo, "-o", tmp_path / "o").exit_code == 2
    result = call("restore", photo, "--weights", weights, "-o", tmp_path / "o", "--device", "abacus")
    assert result.exit_code == 2 and "expected auto, cpu or cuda" in result.output
    result = call("table6", "--size", 100)
    assert result.exit_code == 2 and "multiple of 8" in result.output
    if not torch.cuda.is_available():
        assert call("table6", "--device", "cuda").exit_code == 2


def test_missing_packages_are_named(photo, weights, tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "imagecodecs" else find(name, *a))
    result = call("restore", photo, "--weights", weights, "-o", tmp_path / "o")
    assert result.exit_code == 1
    assert "imagecodecs not installed; try: pip install 'mirage-kernels[images]'" in result.output


# --- table6


def test_table6(tmp_path):
    files = {kind: tmp_path / "sub" / f"t.{kind}" for kind in ("json", "csv", "png")}
    threads = torch.get_num_threads()
    try:
        result = call(
            "table6", "--size", 16, "--runs", 1, "--variant", "T", "--implementation", "reference", "--device", "cpu",
            "--threads", 1, "--json", files["json"], "--csv", files["csv"], "--plot", files["png"],
        )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    assert "ours, reference" in result.output and "PromptIR" in result.output
    content = json.loads(files["json"].read_text())
    assert content["conditions"]["threads"] == 1 and len(content["measured"]) == 1
    assert files["csv"].read_text().count("\n") == 1 + 8 + 1
    assert files["png"].read_bytes().startswith(b"\x89PNG")


def test_table6_of_every_network_says_which_are_left_out(monkeypatch):
    from mirage import table6

    asked = {}
    monkeypatch.setattr(table6, "run", lambda **options: asked.update(options) or table6.Table6(CONDITIONS, ()))
    result = call("table6", "--all", "--size", 16, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert asked["variants"] == ("T", "S", "PromptIR", "Restormer", "NAFNet")
    assert "without AirNet: it is not in this package" in result.output
    assert "without AdaIR: no folder of checkouts was given; it is in github.com/c-yn/AdaIR" in result.output.replace(
        "\n", " "
    )
    assert call("table6", "--all", "--variant", "T").exit_code == 2
    result = call("table6", "--variant", "AdaIR", "--device", "cpu")
    assert list(asked["variants"]) == ["AdaIR"]


CONDITIONS = {"input_size": [1], "dtype": "", "image": "", "device": "", "threads": 1, "torch": "", "runs": 1}


# --- doctor


def test_doctor_checks_every_operator():
    result = call("doctor", "--json")
    report = json.loads(result.output)
    assert result.exit_code == 0, [c for c in report["checks"] if not c["passed"]]
    assert report["healthy"] is True
    assert report["versions"]["torch"] == torch.__version__
    assert report["implementations"] == mirage_kernels.available()
    ran = {(c["operator"], c["implementation"]) for c in report["checks"]}
    usable = {name for name, state in mirage_kernels.available().items() if state == "yes"}
    slow = set() if torch.cuda.is_available() else {"triton"}  # modes in its interpreter would take a minute
    every = [(f"{op.name} {op.mode}".strip(), {"torch", *op.implementations} - (slow if op.mode else set()))
             for op in operators()]  # fmt: skip
    assert ran == {(name, impl) for name, written in every for impl in usable if impl in written}
    for check in report["checks"]:
        assert 0 <= check["error"] <= check["limit"] < 1e-4


def test_doctor_says_that_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = call("doctor", "--gpu")
    assert result.exit_code == 2 and "no CUDA device is available" in result.output


def test_tune_needs_a_device_and_sizes(monkeypatch, tmp_path):
    output = str(tmp_path / "tuning.json")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device is available" in call("tune", "-o", output, "--device", "cuda").output
    assert "expected a CPU or a CUDA device, got 'meta'" in call("tune", "-o", output, "--device", "meta").output
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    wrong = call("tune", "-o", output, "--size", "224")
    assert wrong.exit_code == 2 and "expected HxW, such as 224x224, got '224'" in wrong.output
    wrong = call("tune", "-o", str(tmp_path / "nowhere" / "tuning.json"))
    assert wrong.exit_code == 2 and "no folder" in wrong.output
    wrong = call("tune", "-o", output, "--rounds", "3")
    assert wrong.exit_code == 2 and "expected with --device cpu alone, got it with cuda" in wrong.output


def test_tune_writes_what_it_found(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    from mirage import tune
    from mirage_kernels._runtime import tuning

    asked = []

    def found(*arguments):
        asked.append(arguments)
        tuner = tune.Tuner(lambda call: 1.0)
        tuner.times, tuner.launches = {"a": (2.0, 0.5), "b": (1.0, 1.0)}, {"a": {"num_warps": 8, "num_stages": 2}}
        chooser = tune.Chooser(lambda call: 1.0)
        chooser.times, chooser.choices = {"c": (1.0, 2.0), "d": (2.0, 1.0)}, {"d": "cuda"}
        return tuning.Tuning("H200", "3.6.0", tuner.launches, chooser.choices), tuner, chooser

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "tune", found)
    output = tmp_path / "tuning.json"
    result = call("tune", "-o", str(output), "--size", "64x48", "--size", "8x8", "--batch", "2", "--step")
    assert result.exit_code == 0 and asked == [("tiny", [(2, 3, 64, 48), (2, 3, 8, 8)], [torch.bfloat16], True)]
    assert "2 kinds of launches, 1 of them faster otherwise" in result.output
    assert "one of each takes 1.500 instead of 3.000 ms" in result.output
    assert "2 kinds of calls, 1 of them faster in CUDA C++ than in Triton" in result.output
    assert tuning.load(output).launches == {"a": {"num_warps": 8, "num_stages": 2}}
    assert tuning.load(output).choices == {"d": "cuda"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_doctor_on_a_gpu():
    report = json.loads(call("doctor", "--gpu", "--json").output)
    assert report["healthy"] is True
    assert {c["dtype"] for c in report["checks"]} == {"float32", "float16", "bfloat16"}
    assert {c["implementation"] for c in report["checks"]} - {"cuda"} == {"torch", "triton"}
    assert all(c["device"] == "cuda" and c["milliseconds"] > 0 for c in report["checks"])


def test_export_writes_what_loads_again(tmp_path):
    model = mirage.mirage_tiny()
    state = {f"net.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    result = call("export", str(tmp_path / "a.safetensors"), "--weights", str(tmp_path / "a.ckpt"))
    assert result.exit_code == 0 and "wrote" in result.output
    again = mirage.from_checkpoint(tmp_path / "a.safetensors").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    wrong = call("export", str(tmp_path / "a.pth"), "--weights", str(tmp_path / "a.ckpt"))
    assert wrong.exit_code == 1 and "must end in .safetensors" in wrong.output and not (tmp_path / "a.pth").exists()


def test_doctor_checks_large_images_in_16_bit_and_times_them(monkeypatch):
    """What --gpu asks for, of two operators, on the CPU."""
    monkeypatch.setattr(self_check, "SECONDS", 0.001)
    monkeypatch.setattr(self_check, "LARGE", 16)
    states = mirage_kernels.available() | {"triton": "minutes in the interpreter"}
    monkeypatch.setattr(mirage_kernels, "available", lambda: states)
    chosen = operators(["feed_forward_stage", "mixer_stage"])
    checks = doctor.check_operators(chosen, "cpu", (torch.float32, torch.bfloat16), timed=True, large=True)
    runnable = {name for name, state in states.items() if state == "yes"}
    assert len(checks) == 2 * sum(len(runnable & {"torch", *op.implementations}) for op in chosen) > 0
    for check in checks:
        assert check.passed and check.milliseconds > 0 and check.device == "cpu", check
        assert (check.limit > 1e-4) == (check.dtype == "bfloat16")


def test_doctor_prints_tables():
    result = call("doctor", "--no-check")
    assert result.exit_code == 0
    for word in ("python", "torch", "triton", "cpu", "cpp", "features"):
        assert word in result.output


def test_doctor_tells_what_every_operator_runs_on_and_why_not_on_the_others():
    made = {choice.operator: choice for choice in doctor.choices() if choice.device == "cpu"}
    assert set(made) == {operator.name for operator in operators()}
    for name, choice in made.items():
        assert set(choice.why_not) == {"cpp", "triton", "cuda"} - {choice.implementation}
        assert all(choice.why_not.values())
        operator = operators([name])[0]
        with torch.no_grad():
            operator.public(*operator.inputs(operator.shapes[0], torch.float32))
        ran = mirage_kernels.last_used(name)
        assert choice.implementation == ("torch" if ran == "composite" else ran), name
    printed = " ".join(call("doctor", "--no-check").output.split())
    assert "Why not the others" in printed and "dense_conv2d has no kernel in" in printed
    first, *_ = json.loads(call("doctor", "--no-check", "--json").output)["choices"]
    assert first["why_not"] == made[first["operator"]].why_not


def patch(monkeypatch, function):
    """Another function in the place of an operator's."""
    cases, (_, reference) = REGISTERED["channel_layer_norm"]
    monkeypatch.setitem(REGISTERED, "channel_layer_norm", (cases, (function, reference)))


def test_doctor_finds_a_wrong_operator(monkeypatch):
    right = mirage_kernels.channel_layer_norm

    def wrong(x, *rest):
        y = right(x, *rest)
        on_cpp = mirage_kernels.last_used("channel_layer_norm") == "cpp"
        return y * (1 + 1e-5) if x.dtype == torch.float32 and on_cpp else y

    patch(monkeypatch, wrong)
    checks = {check.implementation: check for check in doctor.check_operators(operators(["channel_layer_norm"]))}
    assert checks["torch"].passed
    if "cpp" not in checks:
        pytest.skip("the C++ library is not built: " + mirage_kernels.available()["cpp"])
    assert not checks["cpp"].passed and checks["cpp"].error == pytest.approx(1e-5, rel=0.2)


@pytest.mark.parametrize("fault", ["nan", "raise", "absent"])
def test_doctor_reports_faults(monkeypatch, fault):
    right = mirage_kernels.channel_layer_norm

    def wrong(x, *rest):
        if fault == "raise":
            raise RuntimeError("kernel fault")
        return right(x, *rest) * (float("nan") if fault == "nan" else 1)

    patch(monkeypatch, None if fault == "absent" else wrong)
    checks = doctor.check_operators(operators(["channel_layer_norm"]))
    assert not checks[0].passed
    report = doctor.Report({}, [], {}, checks)
    assert not report.healthy and report.as_dict()["healthy"] is False
    if fault == "raise":
        assert checks[0].problem == "RuntimeError: kernel fault"
    monkeypatch.setattr(doctor, "examine", lambda check, gpu: report)
    result = call("doctor")
    assert result.exit_code == 1
