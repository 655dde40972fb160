"""`mirage tune --device cpu`: what it measures and prints, and how it chooses. Times are made up but for one."""

import math

import pytest
from click.testing import CliRunner

import mirage_kernels
from mirage import tune_cpu
from mirage.cli import main
from mirage.tune_cpu import Case, by_built_in, choose, slower_than_float32
from mirage_kernels._runtime import dispatch, tuning
from mirage_kernels._runtime.processor import cpu_name
from mirage_kernels._runtime.tuning import CpuTuning

SHAPE = (1, 3, 16, 16)
SINGLE, HALF, STEP = Case(SHAPE, "float32"), Case(SHAPE, "bfloat16"), Case(SHAPE, "bfloat16", step=True)


def call(*arguments):
    return CliRunner().invoke(main, ["tune", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture
def native():
    if mirage_kernels.available()["cpp"] != "yes":
        pytest.skip(mirage_kernels.available()["cpp"])
    return dispatch.native


def test_cases_are_named():
    assert [str(case) for case in (SINGLE, HALF, STEP)] == ["16x16 float32", "16x16 bfloat16", "16x16 bfloat16 step"]


@pytest.mark.parametrize(
    "avx2, chosen",
    [
        ((50.0, 2.0), "avx2"),  # half the time in both
        ((96.0, 3.84), "avx2"),  # just so much less
        ((98.0, 3.92), "avx512"),  # noise
        ((200.0, 2.0), "avx512"),  # twice the time here, half of it there
        ((110.0, 1.0), "avx2"),  # a short case counts like a long one
    ],
)
def test_another_set_is_chosen_where_it_is_clearly_faster(avx2, chosen):
    times = {SINGLE: {"avx2": avx2[0], "avx512": 100.0}, HALF: {"avx2": avx2[1], "avx512": 4.0}}
    assert choose(times, "avx512") == chosen
    assert by_built_in(times, "avx512")["avx2"] == pytest.approx(math.sqrt(avx2[0] / 100 * avx2[1] / 4))
    assert by_built_in(times, "avx512")["avx512"] == 1


def test_the_fastest_of_several_is_chosen():
    assert choose({SINGLE: {"avx2": 8.0, "avx512": 7.0, "avx512_bf16": 10.0}}, "avx512_bf16") == "avx512"
    assert choose({SINGLE: {"baseline": 8.0}}, "baseline") == "baseline"


def test_dtypes_that_do_not_pay_are_found():
    times = {
        SINGLE: {"avx2": 10.0, "avx512": 9.0},
        HALF: {"avx2": 15.0, "avx512": 6.0},
        STEP: {"avx2": 99.0, "avx512": 99.0},  # with no float32 beside it
    }
    assert slower_than_float32(times, "avx2") == {HALF: 1.5}
    assert slower_than_float32(times, "avx512") == {}
    assert slower_than_float32({SINGLE: {"avx2": 10.0}, HALF: {"avx2": 10.2}}, "avx2") == {}  # noise


def test_the_network_is_measured_on_every_set(native, tmp_path, monkeypatch):
    monkeypatch.setenv("MIRAGE_CPU_ISA", "baseline")  # which is of no concern to it
    found = tune_cpu.tune_cpu("tiny", [SHAPE], ["float32", "bfloat16"], step=True, rounds=1)
    sets, built_in = tune_cpu.instruction_sets()
    assert found.built_in == built_in == native.built_in_cpu_isa() and built_in in sets
    assert "baseline" not in sets or sets == ("baseline",)
    assert set(found.times) == {SINGLE, HALF, STEP, Case(SHAPE, "float32", step=True)}
    for of_case in found.times.values():
        assert tuple(of_case) == sets and all(0 < milliseconds < 1e5 for milliseconds in of_case.values())
    assert found.tuning == CpuTuning(cpu_name(), choose(found.times, built_in))


def test_a_process_that_runs_another_set_is_told(native):
    lacking = set(tuning.INSTRUCTION_SETS) - {i for i in tuning.INSTRUCTION_SETS if not native.cpu_isa_problem(i)}
    if not lacking:
        pytest.skip("this machine has every instruction set")
    isa = lacking.pop()
    worker = tune_cpu._Worker(isa, "tiny", [SINGLE])
    try:
        with pytest.raises(RuntimeError, match=f"the process that measures {isa} runs {native.built_in_cpu_isa()}"):
            worker.await_start()
    finally:
        worker.close()


def test_the_command_writes_what_it_found(native, tmp_path):
    output = tmp_path / "cpu.json"
    result = call("-o", output, "--device", "cpu", "--size", "16x16", "--rounds", "1", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    found = tuning.load(output)
    assert isinstance(found, CpuTuning) and found.device == cpu_name() and found.isa in tuning.INSTRUCTION_SETS
    assert f"wrote {output}; use it with MIRAGE_TUNING={output}" in result.output
    assert f"chosen: {found.isa}" in result.output and f"{native.built_in_cpu_isa()} (built in)" in result.output


def test_the_command_says_what_it_chose_and_which_dtypes_do_not_pay(monkeypatch, tmp_path):
    asked = []

    def made_up(*arguments, on_step):
        on_step("round 1 of 7")
        asked.append(arguments)
        times = {SINGLE: {"avx2": 10.0, "avx512": 20.0}, HALF: {"avx2": 15.0, "avx512": 30.0}}
        return tune_cpu.Found(CpuTuning("EPYC", "avx2"), "avx512", times)

    monkeypatch.setattr(tune_cpu, "tune_cpu", made_up)
    result = call("-o", tmp_path / "cpu.json", "--device", "cpu", "--size", "16x16", "--batch", "2", "--size", "16x16")
    assert asked == [("tiny", ((2, 3, 16, 16),), ("float32", "bfloat16"), False, 7)]
    assert "round 1 of 7" in result.output
    assert "chosen: avx2, which takes 0.500 of the time of avx512, the built-in choice" in result.output
    assert "16x16 bfloat16 is slower than float32: 1.50 times its time with avx2" in result.output
    assert tuning.load(tmp_path / "cpu.json") == CpuTuning("EPYC", "avx2")


def test_a_process_that_ends_is_told(native, monkeypatch, tmp_path):
    monkeypatch.setattr(tune_cpu.sys, "executable", "false")
    result = call("-o", tmp_path / "cpu.json", "--device", "cpu")
    assert result.exit_code == 1 and "ended with status 1" in result.output
    assert not (tmp_path / "cpu.json").exists()


def test_without_the_library_there_is_nothing_to_measure(monkeypatch, tmp_path):
    monkeypatch.setattr(dispatch, "native", None)
    monkeypatch.setattr(dispatch, "_native_problem", "not built: a reason")
    result = call("-o", tmp_path / "cpu.json", "--device", "cpu")
    assert result.exit_code == 1 and "the C++ library is not built: a reason" in result.output
    with pytest.raises(ValueError, match="rounds: expected at least 1, got 0"):
        tune_cpu.tune_cpu("tiny", [SHAPE], ["float32"], rounds=0)
