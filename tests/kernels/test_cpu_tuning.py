"""Which instruction set the C++ kernels run on: by itself, by MIRAGE_CPU_ISA, and by a file of `mirage tune`."""

import json
import os
import textwrap

import pytest
import torch
from harness import require

from mirage_kernels._runtime import dispatch, tuning
from mirage_kernels._runtime.processor import cpu_name
from mirage_kernels._runtime.tuning import INSTRUCTION_SETS, CpuTuning, Tuning

SETTINGS = ("MIRAGE_KERNELS", "MIRAGE_CPU_ISA", "MIRAGE_TUNING", "TRITON_INTERPRET", "MIRAGE_CUDA_EMULATE")
PROGRAM = """
    import json, sys, warnings
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import torch, mirage_kernels
        from mirage_kernels import _native
        mirage_kernels.channel_layer_norm(torch.ones(1, 2, 3, 3), torch.ones(2), torch.ones(2))
    ours = [str(w.message) for w in caught if "MIRAGE" in str(w.message)]
    print(json.dumps([_native.cpu_isa(), ours]))
"""


def there():
    """The instruction sets that this machine has, the lowest first, and the one that runs by itself."""
    require("cpp")
    native = dispatch.native
    return [isa for isa in INSTRUCTION_SETS if not native.cpu_isa_problem(isa)], native.built_in_cpu_isa()


def missing():
    """One that this machine lacks."""
    lacking = set(INSTRUCTION_SETS) - set(there()[0])
    if not lacking:
        pytest.skip("this machine has every instruction set")
    return max(lacking, key=INSTRUCTION_SETS.index)


@pytest.fixture
def active(fresh, tmp_path):
    """The active instruction set of a fresh process, and its warnings; with a file where one is given."""
    require("cpp")
    kept = {k: v for k, v in os.environ.items() if k not in SETTINGS}

    def run(contents=None, **environment):
        if contents is not None:
            contents.save(tmp_path / "tuning.json")
            environment["MIRAGE_TUNING"] = str(tmp_path / "tuning.json")
        done = fresh.run(textwrap.dedent(PROGRAM), environment={**kept, **environment})
        assert done.returncode == 0, done.stderr
        return tuple(json.loads(done.stdout))

    return run


def test_a_file_of_a_cpu_is_written_and_read(tmp_path):
    written = CpuTuning("AMD EPYC", "avx2")
    written.save(tmp_path / "cpu.json")
    assert tuning.load(tmp_path / "cpu.json") == written
    assert json.loads((tmp_path / "cpu.json").read_text()) == {"version": 1, "device": "AMD EPYC", "isa": "avx2"}


@pytest.mark.parametrize(
    "contents, message",
    [
        ({"version": 2, "device": "EPYC", "isa": "avx2"}, "expected a file of version 1 in .*, got 2"),
        ({"version": 1, "isa": "avx2"}, "is incomplete: KeyError 'device'"),
        (
            {"version": 1, "device": "EPYC", "isa": "sse"},
            "isa: expected one of baseline, avx2, avx512, avx512_bf16, amx_bf16, got 'sse'",
        ),
        ({"version": 1, "device": "EPYC", "isa": ["avx2"]}, "isa: expected one of .*, got .'avx2'."),
    ],
)
def test_a_wrong_file_of_a_cpu_is_named(fresh, tmp_path, contents, message):
    path = tmp_path / "cpu.json"
    path.write_text(json.dumps(contents))
    with pytest.raises(ValueError, match=f"^MIRAGE_TUNING: .*{message}"):
        tuning.load(path)


def test_a_wrong_file_ends_the_import(fresh, tmp_path):
    require("cpp")
    done = fresh.run("import mirage_kernels", environment={"MIRAGE_TUNING": str(tmp_path / "none.json")})
    assert done.returncode != 0 and "ValueError: MIRAGE_TUNING: cannot read" in done.stderr


def test_every_set_that_is_there_can_be_chosen_by_a_file(active):
    sets, built_in = there()
    assert active() == (built_in, [])
    for isa in sets:
        assert active(CpuTuning(cpu_name(), isa)) == (isa, [])


def test_every_set_that_is_there_can_be_chosen_by_the_variable(active):
    sets, built_in = there()
    for isa in sets:
        assert active(MIRAGE_CPU_ISA=isa) == (isa, [])
    assert active(MIRAGE_CPU_ISA="") == (built_in, [])


def test_the_variable_wins(active):
    for isa in there()[0]:
        assert active(CpuTuning(cpu_name(), "baseline"), MIRAGE_CPU_ISA=isa) == (isa, [])
    assert active(CpuTuning("another", "baseline"), MIRAGE_CPU_ISA="baseline") == ("baseline", [])


def test_a_file_of_another_cpu_warns_and_changes_nothing(active):
    built_in = there()[1]
    told = f"MIRAGE_TUNING was measured on another; it is not used on {cpu_name()}: {built_in} runs"
    assert active(CpuTuning("another", "baseline")) == (built_in, [told])


def test_a_file_of_a_gpu_says_nothing_to_a_cpu(active):
    assert active(Tuning("H200", "3.6.0", {"a": {"num_warps": 8}}, {"b": "cuda"})) == (there()[1], [])


def test_what_the_machine_lacks_is_told(active):
    built_in = there()[1]
    reason = dispatch.native.cpu_isa_problem(missing())
    told = f"{missing()!r} cannot be used, {reason}: {built_in} runs"
    assert active(CpuTuning(cpu_name(), missing())) == (built_in, [f"MIRAGE_TUNING: {told}"])
    assert active(MIRAGE_CPU_ISA=missing()) == (built_in, [f"MIRAGE_CPU_ISA: {told}"])


def test_an_unknown_set_is_told(active):
    expected = "there is no such instruction set (expected baseline, avx2, avx512, avx512_bf16 or amx_bf16)"
    told = f"MIRAGE_CPU_ISA: 'sse' cannot be used, {expected}: {there()[1]} runs"
    assert active(MIRAGE_CPU_ISA="sse") == (there()[1], [told])


def test_nothing_changes_once_a_kernel_has_run():
    sets = there()[0]
    native, before = dispatch.native, dispatch.native.cpu_isa()
    for isa in (*sets, "sse"):
        native.prefer_cpu_isa(isa)
        assert native.cpu_isa() == before


@pytest.fixture
def file_of_a_cpu(tmp_path, monkeypatch):
    CpuTuning("another", "baseline").save(tmp_path / "cpu.json")
    monkeypatch.setenv("MIRAGE_TUNING", str(tmp_path / "cpu.json"))
    monkeypatch.setattr(tuning, "named", True)
    tuning._read.cache_clear()
    yield
    tuning._read.cache_clear()


def test_a_file_of_a_cpu_says_nothing_to_a_gpu(file_of_a_cpu, recwarn):
    options = {"num_warps": 4}
    assert tuning.apply(None, torch.device("cuda", 0), (), options) is options
    assert tuning.choice("tri_branch_fusion", torch.empty(1, 3, 4, 4)) is None
    assert not recwarn.list
