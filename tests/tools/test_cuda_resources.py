"""tools/cuda_resources.py: what it reads in cuobjdump's output, its occupancy, and what it counts as a failure."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "cuda_resources.py"
HALF = "_ZN6mirage4cuda19feed_forward_kernelINS0_13TensorCores16INS0_3f16EEES3_Li3ELi8EEEvNS0_20FeedForwardArgumentsE"
SUM = "_ZN6mirage4cuda23feed_forward_sum_kernelINS0_4bf16EEEvNS0_20FeedForwardArgumentsE"
HALF_NAME, SUM_NAME = "feed_forward_kernel<TensorCores16<f16>, f16, 3, 8>", "feed_forward_sum_kernel<bf16>"
LAUNCHES = {HALF_NAME: (256, 53760, 80), SUM_NAME: (256, 0, 80)}

# of nvcc 13.0's binaries, with numbers changed: first a file without kernels; SHARED of sm_90 has the system's KiB
USAGE = f"""
Fatbin elf code:
================
arch = sm_80
code version = [1,8]
host = linux
compile_size = 64bit

Resource usage:
 Common:
  GLOBAL:0

Fatbin elf code:
================
arch = sm_80
code version = [1,8]
host = linux
compile_size = 64bit

Resource usage:
 Common:
  GLOBAL:0
 Function {HALF}:
  REG:122 STACK:0 SHARED:100 LOCAL:0 CONSTANT[0]:520 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function {SUM}:
  REG:32 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:520 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_90a
code version = [1,8]
host = linux
compile_size = 64bit

Resource usage:
 Common:
  GLOBAL:0
 Function {HALF}:
  REG:123 STACK:8 SHARED:1124 LOCAL:16 CONSTANT[0]:696 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function {SUM}:
  REG:32 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:696 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function {SUM}:
  REG:32 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:696 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin ptx code:
================
arch = sm_90
code version = [9,0]
host = linux
compile_size = 64bit
compressed
ptxasOptions =
"""

# an excerpt likewise, with instructions of other kernels
SASS = f"""
	code for sm_80
	.target	sm_80

		Function : {HALF}
	.headerflags	@"EF_CUDA_SM80 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM80)"
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;     /* 0x00000a00ff017624 */
                                                                               /* 0x000fe400078e00ff */
        /*1ad0*/               @P0 LDG.E.U16 R15, [R26.64] ;                   /* 0x000000081a0f0981 */
        /*1ae0*/              @!P1 LDG.E.U16.CONSTANT R15, [R26.64] ;          /* 0x000000081a0f0981 */
        /*1af0*/                   LDG.E R13, [R18.64] ;                       /* 0x00000008120d1981 */
        /*1b00*/             @!PT  LDG.E.64 R13, [R18.64] ;                    /* 0x00000008120d1981 */
        /*1b10*/                   LDG.E.128.CONSTANT R4, [R18.64] ;           /* 0x00000008120d1981 */
        /*1b20*/                   LDGSTS.E.BYPASS.128 [R7], [R2.64] ;         /* 0x0000000002077fae */
        /*1b30*/                   LDSM.16.MT88.4 R8, [R4] ;                   /* 0x000000000408783b */
        /*1b40*/                   HMMA.16816.F32 R4, R8, R2, R4 ;             /* 0x000000020804723c */
        /*1b50*/                   HFMA2.MMA R11, -RZ, RZ, 0, 1.8e-07 ;        /* 0x00000003ff0b7435 */
        /*1b60*/                   STL [R1+0x4], R5 ;                          /* 0x0000040501007387 */
        /*1b70*/                   LDL.64 R4, [R1] ;                           /* 0x0000000001047983 */
        /*1b80*/               @P0 BRA 0x1ae0 ;                                /* 0xffffff5000000947 */
        /*1b90*/              @!P0 BRA 0x1bb0 ;                                /* 0x0000001000000947 */
        /*1ba0*/                   BRA 0x1ba0;                                 /* 0xfffffff000007947 */

	code for sm_90a

		Function : {HALF}
        /*0000*/             @!UP0 UBLKCP.S.G [UR4], [UR6], UR8 ;              /* 0x00000004060073ba */
        /*10000*/                  HGMMA.64x64x16.F32 R24, gdesc[UR4], R24 ;   /* 0x00e00000041879f0 */
"""


@pytest.fixture(scope="module")
def tool():
    specification = importlib.util.spec_from_file_location("cuda_resources", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    sys.modules["cuda_resources"] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def on_snippets(tool, monkeypatch):
    """main() on the text above, with what kernels() lists."""

    def run(usage: str = USAGE, launches: dict | None = LAUNCHES, *arguments: str) -> int:
        def launched():
            if launches is None:
                raise RuntimeError("no module")
            return launches

        monkeypatch.setattr(tool, "registry", launched)
        monkeypatch.setattr(tool, "cuobjdump", lambda option, _: (SASS if option == "-sass" else usage).splitlines())
        return tool.main(["some.so", *arguments])

    return run


def _sound(usage: str = USAGE) -> str:
    return usage.replace("STACK:8", "STACK:0").replace("LOCAL:16", "LOCAL:0")


def test_resource_usage(tool):
    codes = tool.usages(USAGE.splitlines())
    assert [(code.arch, code.symbol, code.registers) for code in codes] == [
        ("sm_80", HALF, 122), ("sm_80", SUM, 32), ("sm_90a", HALF, 123), ("sm_90a", SUM, 32),
    ]  # fmt: skip
    assert [code.static_shared for code in codes] == [100, 0, 100, 0]
    assert [(code.stack, code.local) for code in codes] == [(0, 0), (0, 0), (8, 16), (0, 0)]


def test_disassembly(tool):
    counts = tool.disassembly(SASS.splitlines())
    ampere, hopper = counts["sm_80", HALF], counts["sm_90a", HALF]
    assert ampere["loads"] == {2: 2, 4: 1, 8: 1, 16: 1}
    one = dict.fromkeys(("HMMA", "LDSM", "LDGSTS", "LDL", "STL"), 1)
    assert ampere["instructions"] == one | {"HGMMA": 0, "UBLKCP": 0, tool.LOOP: 11, tool.ALL: 15}
    assert hopper["loads"] == {}
    assert {name for name, count in hopper["instructions"].items() if count} == {"HGMMA", "UBLKCP", tool.ALL}


def test_names(tool, monkeypatch):
    assert tool.short_name(HALF) == HALF_NAME and tool.short_name(SUM) == SUM_NAME
    enumerator = "_ZN6mirage4cuda5kern2ILNS0_1EE1ELb1EEEvNS0_4ArgsE"
    assert tool.short_name(enumerator) == "kern2<(E)1, true>"
    assert tool.short_name("_ZN6mirage4cuda5plainENS0_4ArgsEPFviE") == "plain"
    assert tool.short_name("written_in_c") == "written_in_c"

    def absent(name):
        raise OSError(name)

    tool.demangled.cache_clear()
    monkeypatch.setattr(tool.ctypes, "CDLL", absent)
    assert tool.short_name(SUM) == SUM
    tool.demangled.cache_clear()


@pytest.mark.parametrize(
    "gpu, registers, shared, threads, blocks",
    [
        ("sm_90", 128, 0, 256, 2),
        ("sm_90", 129, 0, 256, 1),
        ("sm_90", 32, 0, 256, 8),
        ("sm_90", 33, 0, 256, 6),  # 51 warps by registers, of which 48 are shared out evenly
        ("sm_90", 168, 0, 128, 3),
        ("sm_90", 255, 0, 1024, 0),
        ("sm_80", 16, 0, 32, 32),  # no more blocks than that
        ("sm_80", 16, 81 * 1024, 256, 2),
        ("sm_80", 16, 81 * 1024 + 1, 256, 1),
        ("sm_80", 16, 163 * 1024, 256, 1),
        ("sm_80", 16, 163 * 1024 + 1, 256, 0),
        ("sm_90", 16, 163 * 1024 + 1, 256, 1),
        ("sm_90", 16, 113 * 1024, 256, 2),
        ("sm_90", 16, 227 * 1024 + 1, 256, 0),
    ],
)
def test_occupancy(tool, gpu, registers, shared, threads, blocks):
    assert tool.blocks_of(gpu, registers, shared, threads) == blocks


def test_table_of_a_sound_build(on_snippets, capsys):
    assert on_snippets(_sound(), LAUNCHES, "--sass") == 0
    heading, line, *rows, _, count = capsys.readouterr().out.splitlines()
    assert count == "4 kernels, 0 with problems"
    assert {row.count("|") for row in (heading, line, *rows)} == {heading.count("|")}
    assert rows[0].startswith(f"| `{HALF_NAME}` | sm_80 | 122 | 0 | 0 | 100 | 53760 | 256 | 2 | 25% | 1 | 0 | 1 | 1 |")
    assert rows[0].endswith("| 2:2 4:1 8:1 16:1 |")
    assert rows[3].startswith(f"| `{SUM_NAME}` | sm_90a | 32 | 0 | 0 | 0 | 0 | 256 | 8 | 100% | - |")


def _problems(capsys) -> dict[tuple[str, str], str]:
    found = json.loads(capsys.readouterr().out)
    return {(row["kernel"], row["arch"]): row["problem"] for row in found if row["problem"]}


def test_summary(tool, on_snippets, capsys):
    assert on_snippets(_sound(), LAUNCHES, "--sass", "--summary") == 0
    heading, _, *rows = capsys.readouterr().out.splitlines()
    assert heading.split(" | ")[:3] == ["| kernel", "registers", "dynamic shared [B]"] and "stack" not in heading
    assert len(rows) == 1 and rows[0].startswith(f"| `{HALF_NAME}` | 123 | 53760 | 2 | 25% | 0 |")  # SUM is of bfloat16

    def typical(kernel, arch="sm_90a"):
        return tool.is_typical(tool.Row(kernel, tool.Code(arch, kernel, 32, 0, 0, 0)))

    assert typical("a<TensorCores16<f16>, f16, 2>") and typical("a<ExactFloat, float, 2>") and typical("plain")
    assert typical("a<TensorCoresTf32, f16, 1>") and not typical("a<TensorCoresTf32, 1>")
    assert not any(typical(f"a<{name}>") for name in ("TensorCores16<f16>, float", "TensorCoresTf32, float", "bf16"))
    assert not typical("plain", "sm_80")


def test_spills_are_a_failure(on_snippets, capsys):
    assert on_snippets(USAGE, LAUNCHES, "--json") == 1
    assert _problems(capsys) == {(HALF_NAME, "sm_90a"): "8 bytes of stack and 16 of local memory per thread"}


def test_an_unlisted_kernel_is_a_failure(on_snippets, capsys):
    assert on_snippets(_sound(), {SUM_NAME: (256, 0, 80)}, "--json") == 1
    problems = _problems(capsys)
    assert set(problems) == {(HALF_NAME, "sm_80"), (HALF_NAME, "sm_90a")}
    assert all("not listed" in problem for problem in problems.values())
    assert on_snippets(_sound(), {SUM_NAME: (256, 0, 80)}) == 1
    assert f"{HALF_NAME} sm_80: not listed" in capsys.readouterr().out
    assert on_snippets(_sound(), None) == 1
    assert "no module" in capsys.readouterr().err


def test_too_much_shared_memory_is_a_failure(on_snippets, capsys):
    """Where the library does not refuse that kernel on that GPU; and so is such a refusal without reason."""
    large = LAUNCHES | {HALF_NAME: (256, 200 * 1024, 80)}
    assert on_snippets(_sound(), large, "--json") == 1
    (problem,) = _problems(capsys).items()
    assert problem == ((HALF_NAME, "sm_80"), "wants 204900 bytes of shared memory, the GPU has 166912")
    assert on_snippets(_sound(), LAUNCHES | {HALF_NAME: (256, 200 * 1024, 90)}) == 0
    assert f"{HALF_NAME} sm_80: refused by the library" in capsys.readouterr().out
    assert on_snippets(_sound(), LAUNCHES | {HALF_NAME: (256, 53760, 90)}) == 1
    assert "but this one has its shared memory" in capsys.readouterr().out


def test_an_unknown_architecture_is_a_failure(on_snippets, capsys):
    assert on_snippets(_sound().replace("sm_90a", "sm_120"), LAUNCHES, "--json") == 1
    assert {arch for _, arch in _problems(capsys)} == {"sm_120"}


def test_nothing_found_is_a_failure(tool, on_snippets, monkeypatch, capsys, tmp_path):
    assert on_snippets("") == 1
    assert "no kernel in some.so" in capsys.readouterr().err
    monkeypatch.setattr(tool, "built", lambda name: None)
    assert tool.main([]) == 1
    assert "was built" in capsys.readouterr().err


def test_a_file_without_kernels_is_a_failure(tool, capsys, tmp_path):
    pytest.importorskip("triton")
    file = tmp_path / "some.o"
    file.write_bytes(b"nothing")
    assert tool.main([str(file)]) == 1
    assert str(file) in capsys.readouterr().err


def test_the_library_lists_its_kernels(tool):
    if tool.built("_cuda") is None and tool.built("_cuda_emulated") is None:
        pytest.skip("neither _cuda nor _cuda_emulated is built")
    launches = tool.registry()
    feed_forward = "feed_forward_kernel<ExactFloat, 2, 8>"
    assert {feed_forward, "mixer_fuse_kernel<ExactFloat, 1, 8>", SUM_NAME} <= set(launches)
    assert all(threads % 32 == 0 and 0 < threads <= 1024 for threads, _, _ in launches.values())
    assert launches[SUM_NAME] == (256, 0, 80) and 48 << 10 < launches[feed_forward][1] <= 227 << 10
    too_large = {kernel for kernel, (_, shared, _) in launches.items() if shared > tool.SHARED["sm_80"][0]}
    assert too_large == {kernel for kernel, (_, _, oldest) in launches.items() if oldest == 90} != set()
