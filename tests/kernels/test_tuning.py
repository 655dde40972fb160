"""Tuned launches and choices: the file, when it is used, and how `mirage tune` chooses. Times and GPUs are made up on
the CPU."""

import functools
import json

import pytest
import torch

pytest.importorskip("triton", minversion="3.4")

from harness import require
from test_transformer_blocks import several

import mirage_kernels
from mirage import tune
from mirage_kernels._runtime import dispatch, tuning
from mirage_kernels._runtime.tuning import Tuning, choice_key, launch_key
from mirage_kernels._triton import launch
from mirage_kernels.tri_branch_fusion import op as fusion_op

CUDA = torch.device("cuda", 0)


class Kernel:
    """Records its launches."""

    __name__ = "some_kernel"

    def __init__(self):
        self.launched = []

    def __getitem__(self, grid):
        return lambda *args, **options: self.launched.append((grid, options))


OPTIONS = {"BLOCK": 16, "num_warps": 4, "num_stages": 1}
ARGS = (torch.empty(3, dtype=torch.bfloat16), torch.empty(3), 7)


@pytest.fixture
def use(tmp_path, monkeypatch):
    """Makes a file with these launches the active one, on a GPU of this name."""
    tuning._read.cache_clear()
    tuning._is_for.cache_clear()

    def activate(launches=None, gpu="H200", choices=None):
        path = tmp_path / "tuning.json"
        Tuning("H200", "3.6.0", launches or {}, choices or {}).save(path)
        monkeypatch.setattr(tuning, "named", True)
        monkeypatch.setenv("MIRAGE_TUNING", str(path))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: gpu)

    yield activate
    tuning._read.cache_clear()
    tuning._is_for.cache_clear()


def test_the_key_is_of_what_is_compiled():
    key = launch_key(Kernel(), ARGS, OPTIONS)
    assert key == "some_kernel bfloat16 float32 BLOCK=16"
    assert launch_key(Kernel(), ARGS, OPTIONS | {"num_warps": 8, "num_stages": 3}) == key
    assert launch_key(Kernel(), ARGS, OPTIONS | {"BLOCK": 32}) != key
    assert launch_key(Kernel(), ARGS[1:], OPTIONS) != key


def test_a_file_is_written_and_read(tmp_path):
    written = Tuning("NVIDIA H200", "3.6.0", {"a_kernel float32 C=3": {"num_warps": 8, "num_stages": 2}})
    written.save(tmp_path / "tuning.json")
    assert tuning.load(tmp_path / "tuning.json") == written
    assert [path.name for path in tmp_path.iterdir()] == ["tuning.json"]


def test_tuned_launches_are_used(use):
    key = launch_key(Kernel(), ARGS, OPTIONS)
    use({key: {"num_warps": 8, "num_stages": 2}})
    assert tuning.apply(Kernel(), CUDA, ARGS, OPTIONS) == {"BLOCK": 16, "num_warps": 8, "num_stages": 2}
    other = OPTIONS | {"BLOCK": 32}
    assert tuning.apply(Kernel(), CUDA, ARGS, other) == other
    assert tuning.apply(Kernel(), torch.device("cpu"), ARGS, OPTIONS) == OPTIONS


def test_another_gpu_warns_once_and_uses_nothing(use, recwarn):
    use({launch_key(Kernel(), ARGS, OPTIONS): {"num_warps": 8}}, gpu="A100")
    for _ in range(2):
        assert tuning.apply(Kernel(), CUDA, ARGS, OPTIONS) == OPTIONS
    assert [str(w.message) for w in recwarn] == ["MIRAGE_TUNING was measured on H200; it is not used on A100"]


@pytest.fixture
def on_gpus():
    """What runs on a CPU by itself is what would run on a GPU."""
    require("cuda")
    with dispatch.by_itself("triton", "cpu"):
        yield


X = torch.randn(1, 6, 12, 14)


def fused(x):
    """An operator that Triton's interpreter runs in a moment."""
    one = torch.ones(1)
    return mirage_kernels.tri_branch_fusion(x, x, x, one, one, one)


def test_the_key_of_a_choice_is_of_dtype_channels_and_about_the_size():
    key = choice_key("tri_branch_fusion", X)
    assert key == "tri_branch_fusion float32 C=6 size=0"
    assert choice_key("tri_branch_fusion", X[..., :13]) == key
    others = (X.half(), X[:, :3], X.repeat(2, 1, 1, 1))
    assert len({key, *(choice_key("tri_branch_fusion", x) for x in others)}) == 4
    assert choice_key("a", torch.empty(1, 3, 4096, 4096)) == "a float32 C=3 size=8"
    assert choice_key("a", torch.empty(1, 3, 4096, 4097)) == "a float32 C=3 size=9"


def test_measured_choices_are_used(use, on_gpus):
    use(choices={choice_key("tri_branch_fusion", X): "cuda"})
    fused(X)
    assert mirage_kernels.last_used("tri_branch_fusion") == "cuda"
    fused(X.half())
    assert mirage_kernels.last_used("tri_branch_fusion") == "triton"
    with mirage_kernels.use("triton"):
        fused(X)
    assert mirage_kernels.last_used("tri_branch_fusion") == "triton"


def test_backward_has_a_choice_of_its_own(use, on_gpus, monkeypatch):
    ran = []
    for name in ("triton", "cuda"):
        module = fusion_op._implementations[name]
        record = functools.partial(lambda name, run, *args: ran.append(name) or run(*args), name, module.backward)
        monkeypatch.setattr(module, "backward", record)
    use(choices={choice_key("tri_branch_fusion_backward", X): "cuda"})
    x = X.clone().requires_grad_()
    fused(x).sum().backward()
    assert mirage_kernels.last_used("tri_branch_fusion") == "triton" and ran == ["cuda"]
    with mirage_kernels.use("triton"):
        y = fused(x)
    y.sum().backward()  # on what forward was forced to run on
    assert ran == ["cuda", "triton"]


def test_choices_are_of_what_runs_there(use, on_gpus, monkeypatch):
    use(choices={choice_key("tri_branch_fusion", X): "cuda"})
    monkeypatch.setattr(dispatch, "cuda", None)
    monkeypatch.setattr(dispatch, "_cuda_problem", "not built")
    fused(X)
    assert mirage_kernels.last_used("tri_branch_fusion") == "triton"
    with dispatch.by_itself("cpp", "cpu"):  # a CPU has nothing to choose
        fused(X)
    assert mirage_kernels.last_used("tri_branch_fusion") == "cpp"


def test_choices_of_another_gpu_are_not_used(use, on_gpus):
    use(choices={choice_key("tri_branch_fusion", X): "cuda"}, gpu="A100")
    with pytest.warns(UserWarning, match="was measured on H200; it is not used on A100"):
        fused(X)
    assert mirage_kernels.last_used("tri_branch_fusion") == "triton"


def test_choices_are_seen_by_compile(use, on_gpus, monkeypatch):
    monkeypatch.setattr(tuning, "_chosen", torch.compiler.assume_constant_result(tuning._chosen))
    use(choices={choice_key("tri_branch_fusion", X): "cuda"})
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(X), fused(X))
    assert mirage_kernels.last_used("tri_branch_fusion") == "cuda"


def test_without_a_file_nothing_changes(use, monkeypatch):
    monkeypatch.delenv("MIRAGE_TUNING", raising=False)
    assert tuning.apply(Kernel(), CUDA, ARGS, OPTIONS) is OPTIONS


@pytest.mark.parametrize(
    "contents, message",
    [
        ("{", "cannot read"),
        (None, "cannot read"),
        ("[]", "expected a file of version 1 in .*, got None"),
        ('{"version": 2}', "expected a file of version 1 in .*, got 2"),
        ('{"version": 1, "device": "H200"}', "is incomplete: KeyError 'triton'"),
        ('{"version": 1, "device": "H200", "triton": "3", "launches": {"a": {"num_ctas": 2}}}', "num_ctas"),
        ('{"version": 1, "device": "H200", "triton": "3", "launches": {"a": {"num_warps": 3}}}',
         "num_warps of 'a': expected one of 1, 2, 4, 8, 16, 32, got 3"),
        ('{"version": 1, "device": "H200", "triton": "3", "launches": {}, "choices": {"a": "cpp"}}',
         "choice of 'a': expected triton or cuda, got 'cpp'"),
        ('{"version": 1, "device": "H200", "triton": "3", "launches": [1]}', "is incomplete: AttributeError"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_named(tmp_path, contents, message):
    path = tmp_path / "tuning.json"
    if contents is not None:
        path.write_text(contents)
    with pytest.raises(ValueError, match=f"^MIRAGE_TUNING: .*{message}"):
        tuning.load(path)


class TestTuner:
    def choose(self, times, options=OPTIONS):
        """What a tuner chooses where a call takes `times[(warps, stages)]`, 1 where there is none."""
        kernel = Kernel()

        def time(call):
            call()
            _, launched = kernel.launched[-1]
            result = times.get((launched["num_warps"], launched["num_stages"]), 1.0)
            if isinstance(result, Exception):
                raise result
            return result

        tuner = tune.Tuner(time)
        tuner(kernel, 5, ARGS, options)
        return tuner, kernel

    def test_the_fastest_is_kept_and_launched(self):
        tuner, kernel = self.choose({(4, 1): 0.8, (8, 2): 0.3, (2, 3): 0.4})
        key = launch_key(kernel, ARGS, OPTIONS)
        assert tuner.launches == {key: {"num_warps": 8, "num_stages": 2}} and tuner.times == {key: (0.8, 0.3)}
        assert kernel.launched[-1] == ((5,), {"BLOCK": 16, "num_warps": 8, "num_stages": 2, **tuning.FP_FUSION})
        tried = {(options["num_warps"], options["num_stages"]) for _, options in kernel.launched}
        assert tried == {(warps, stages) for warps in tune.WARPS for stages in tune.STAGES}
        count = len(kernel.launched)
        tuner(kernel, 5, ARGS, OPTIONS | {"num_stages": 3})  # the same kind
        assert len(kernel.launched) == count + 1

    def test_noise_changes_nothing(self):
        tuner, kernel = self.choose({(4, 1): 0.8, (8, 2): 0.79})
        assert tuner.launches == {} and list(tuner.times.values()) == [(0.8, 0.8)]
        assert kernel.launched[-1] == ((5,), OPTIONS | tuning.FP_FUSION)

    def test_what_does_not_fit_is_passed_over(self):
        class OutOfResources(Exception):
            pass

        tuner, _ = self.choose({(8, 2): OutOfResources(), (8, 3): 0.5})
        assert list(tuner.launches.values()) == [{"num_warps": 8, "num_stages": 3}]
        with pytest.raises(RuntimeError, match="a fault"):
            self.choose({(8, 2): RuntimeError("a fault")})

    def test_nothing_to_launch(self):
        kernel = Kernel()
        tuner = tune.Tuner(lambda call: 1.0)
        tuner(kernel, 0, ARGS, OPTIONS)
        assert kernel.launched == [] and tuner.times == {}


class TestChooser:
    def chooser(self, cuda):
        """A call takes 1 on Triton and `cuda` in CUDA C++."""
        self.timed = []

        def time(call):
            self.timed.append(call.args[-1])
            return {"triton": 1.0, "cuda": cuda}[call.args[-1]]

        return tune.Chooser(time)

    @pytest.mark.parametrize("cuda, chosen", [(0.5, "cuda"), (0.98, None), (2.0, None)])
    def test_calls_are_timed_once_on_both(self, cuda, chosen):
        chooser, x = self.chooser(cuda), X.clone().requires_grad_()
        with mirage_kernels.use("cpp"), torch.no_grad():
            fused(x)
        assert self.timed == []
        require("cuda")
        with mirage_kernels.use("cuda"), chooser:
            for _ in range(2):
                fused(x).sum().backward()
        names = ("tri_branch_fusion", "tri_branch_fusion_backward")
        keys = [choice_key(name, X) for name in names]
        assert chooser.times == dict.fromkeys(keys, (1.0, cuda)) and self.timed == ["triton", "cuda"] * 2
        assert chooser.choices == (dict.fromkeys(keys, chosen) if chosen else {})

    def test_levels_are_compared_with_their_stages(self):
        require("cuda")
        times, values = iter((1.0, 0.5)), []

        def time(call):
            values.append(call())
            return next(times)

        chooser, blocks = tune.Chooser(time), several((1, 12, 5, 6, 2), 2)
        for name in ("mixer_stage", "feed_forward_stage"):
            chooser.choices[choice_key(name, blocks[0])] = "cuda"
        with torch.no_grad(), mirage_kernels.use("cuda"), chooser:
            y = mirage_kernels.transformer_blocks(*blocks)
        assert chooser.choices[choice_key("transformer_blocks", y)] == "cuda"
        assert len(values) == 2 and all(torch.equal(value, y) for value in values)  # its stages, and all at once
        with torch.no_grad(), mirage_kernels.use("cuda"):
            assert torch.equal(mirage_kernels.transformer_blocks(*blocks), y)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_network_is_tuned(tmp_path):
    found, tuner, chooser = tune.tune("tiny", [(1, 3, 64, 64)], [torch.bfloat16], step=True)
    assert launch.launch_hook is None
    names = {key.split()[0] for key in tuner.times}
    assert {"prepare_kernel", "gram_kernel", "fusion_gradient_kernel"} <= names
    if mirage_kernels.available()["cuda"] == "yes":
        names = {key.split()[0] for key in chooser.times}
        assert {"mixer_stage", "feed_forward_stage", "transformer_blocks", "feed_forward_stage_backward"} <= names
    found.save(tmp_path / "tuning.json")
    assert json.loads((tmp_path / "tuning.json").read_text())["device"] == torch.cuda.get_device_name()
