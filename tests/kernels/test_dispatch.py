"""Which implementation runs: forcing one, the reasons against one, and an installation without the library."""

import json
import os
import subprocess
import textwrap

import pytest
import torch

import mirage_kernels
from mirage_kernels._runtime import dispatch
from mirage_kernels._runtime.implementations import ON_GPUS, RANKED
from mirage_kernels.channel_layer_norm import cpp


def norm(x):
    return mirage_kernels.channel_layer_norm(x, torch.ones(x.shape[1]).to(x), torch.zeros(x.shape[1]).to(x))


@pytest.fixture
def x():
    return torch.randn(1, 4, 3, 3)


@pytest.fixture
def run_python(fresh):
    """A program in a fresh process, without what the test run has set."""
    ours = ("MIRAGE_KERNELS", "TRITON_INTERPRET", "MIRAGE_CUDA_EMULATE")
    kept = {k: v for k, v in os.environ.items() if k not in ours}

    def run(code: str, **environment: str) -> subprocess.CompletedProcess:
        return fresh.run(textwrap.dedent(code), environment={**kept, **environment})

    return run


def test_the_device_decides(x):
    norm(x)
    expected = "cpp" if mirage_kernels.available()["cpp"] == "yes" else "torch"
    assert mirage_kernels.last_used("channel_layer_norm") == expected


def test_use_nests_and_ends(x):
    with mirage_kernels.use("torch"):
        norm(x)
        assert mirage_kernels.last_used("channel_layer_norm") == "torch"
        if mirage_kernels.available()["cpp"] == "yes":
            with mirage_kernels.use("cpp"):
                norm(x)
                assert mirage_kernels.last_used("channel_layer_norm") == "cpp"
        norm(x)
        assert mirage_kernels.last_used("channel_layer_norm") == "torch"
    by_itself = "cpp" if mirage_kernels.available()["cpp"] == "yes" else "torch"
    norm(x)
    assert mirage_kernels.last_used("channel_layer_norm") == by_itself
    with pytest.raises(ZeroDivisionError), mirage_kernels.use("torch"):
        raise ZeroDivisionError
    norm(x)
    assert mirage_kernels.last_used("channel_layer_norm") == by_itself


def test_backward_runs_where_forward_ran(x, monkeypatch):
    if mirage_kernels.available()["cpp"] != "yes":
        pytest.skip(mirage_kernels.available()["cpp"])
    ran = []
    backward = cpp.backward
    monkeypatch.setattr(cpp, "backward", lambda *arguments: ran.append("cpp") or backward(*arguments))
    x.requires_grad_()
    with mirage_kernels.use("cpp"):
        y = norm(x)
    with mirage_kernels.use("torch"):
        y.sum().backward()
    assert ran == ["cpp"]


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="implementation: expected one of torch, cpp, triton, cuda, got 'cudnn'"):
        mirage_kernels.use("cudnn").__enter__()
    assert mirage_kernels.last_used("no_such_operator") is None


def test_a_forced_implementation_that_cannot_run_says_why(x):
    expected = "'triton' was asked for but cannot run: .*(float64|not installed|too old)"
    with mirage_kernels.use("triton"), pytest.raises(RuntimeError, match=expected):
        norm(x.double())


def test_reasons_against_implementations(x):
    mirage_kernels.channel_layer_norm(x, torch.ones(4), torch.ones(4))
    with mirage_kernels.use("torch"):
        mirage_kernels.dense_conv2d(x, torch.ones(2, 4, 3, 3))
        mirage_kernels.channel_attention(*torch.rand(3, 1, 65, 2, 2), torch.ones(1), 1)
    reasons = mirage_kernels.why_not("dense_conv2d")
    assert set(reasons) == {"cpp", "triton", "cuda"}
    assert reasons["triton"] == "dense_conv2d has no kernel in triton: on GPUs it is cuDNN's"
    assert reasons["cpp"] == dispatch._problem("cpp", "cpu")
    reasons = mirage_kernels.why_not("channel_attention")
    assert reasons["cuda"] == "its kernels take heads of up to 64 channels, not of 65"
    torch.vmap(norm)(x[None])
    assert "torch.func" in mirage_kernels.why_not("channel_layer_norm")["cpp"]
    norm(torch.empty(1, 4, 3, 3, device="meta"))
    assert mirage_kernels.why_not("channel_layer_norm")["cpp"].endswith("not on meta")
    assert mirage_kernels.why_not("no_such_operator") == {}


def test_strictly_an_operator_that_declines_raises_with_the_reason(x):
    """Where it runs as by itself otherwise, and `why_not` tells the same."""
    if mirage_kernels.available()["cuda"] != "yes" or torch.cuda.is_available():
        pytest.skip("needs MIRAGE_CUDA_EMULATE=1")
    attention = (*torch.rand(3, 1, 65, 2, 2), torch.ones(1), 1)
    for name, arguments, reason in (
        ("dense_conv2d", (x, torch.ones(2, 4, 3, 3)), "dense_conv2d has no kernel in cuda: on GPUs it is cuDNN's"),
        ("channel_attention", attention, "its kernels take heads of up to 64 channels, not of 65"),
    ):
        function = getattr(mirage_kernels, name)
        with mirage_kernels.use("cuda"):
            function(*arguments)
            assert mirage_kernels.last_used(name) != "cuda"
            assert mirage_kernels.why_not(name)["cuda"] == reason
        expected = f"^{name}: the implementation 'cuda' was asked for but cannot run: {reason}$"
        with mirage_kernels.use("cuda", strict=True), pytest.raises(RuntimeError, match=expected):
            function(*arguments)
        with mirage_kernels.use("cuda", strict=True), mirage_kernels.use("torch"):
            function(*arguments)
        assert mirage_kernels.last_used(name) == "torch"


def test_what_operators_run_on_here_and_why_not_on_the_others():
    with dispatch.by_itself("cpp", "cpu"):
        chosen, others = dispatch.outlook("cpu")
    runs = not dispatch._problem("cpp", "cpu")
    assert chosen == ("cpp" if runs else "torch")
    for name, reason in others.items():
        assert reason == (dispatch._problem(name, "cpu") or f"{chosen} comes first")
    assert set(others) == {"cpp", "triton", "cuda"} - {chosen}
    chosen, others = dispatch.outlook("cpu", {"cpp": "it has none"})
    assert chosen == "torch" and others["cpp"] == "it has none"
    with mirage_kernels.use("torch"):
        chosen, others = dispatch.outlook("cpu")
    assert chosen == "torch" and others["cpp"] == (dispatch._problem("cpp", "cpu") or "torch is asked for")
    assert dispatch.outlook("xpu")[0] == "torch"


def test_a_device_has_one_list_of_what_comes_first():
    assert set(RANKED) == {"cpu", "cuda"} and ON_GPUS == RANKED["cuda"]
    assert sorted(name for names in RANKED.values() for name in names) == sorted(mirage_kernels.IMPLEMENTATIONS[1:])


def test_environment_forces_one(run_python):
    code = """
        import torch, mirage_kernels
        mirage_kernels.channel_layer_norm(torch.ones(1, 2, 3, 3), torch.ones(2), torch.ones(2))
        print(mirage_kernels.last_used("channel_layer_norm"))
    """
    assert run_python(code, MIRAGE_KERNELS="torch").stdout.strip() == "torch"
    result = run_python(code, MIRAGE_KERNELS="fortran")
    assert "MIRAGE_KERNELS: expected one of torch, cpp, triton, cuda, got 'fortran'" in result.stderr
    result = run_python(code, MIRAGE_KERNELS="triton")
    assert "cannot run" in result.stderr


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("missing", "not built"),
        ("broken", "broken: the extension exists but does not load"),
        ("old", "old: the extension was built from other sources than these, whose functions take other arguments"),
    ],
)
@pytest.mark.parametrize(("module", "implementation"), [("._native", "cpp"), ("._cuda", "cuda")])
def test_a_missing_extension_a_broken_one_and_an_old_one_differ(how, reason, module, implementation, run_python):
    """Either way something else serves: without the C++ library the PyTorch reference."""
    code = f"""
        import importlib.util, sys, types
        find = importlib.util.find_spec
        if {how!r} == "missing":
            importlib.util.find_spec = lambda name, *a: None if name.endswith({module!r}) else find(name, *a)
        else:
            importlib.util.find_spec = lambda name, *a: True if name.endswith({module!r}) else find(name, *a)
            # the import system raises ImportError for None; a module without a number is older than these
            sys.modules["mirage_kernels" + {module!r}] = None if {how!r} == "broken" else types.ModuleType("old")
        import torch, mirage_kernels
        print(mirage_kernels.available()[{implementation!r}])
        mirage_kernels.channel_layer_norm(torch.ones(1, 2, 3, 3), torch.ones(2), torch.ones(2))
        print(mirage_kernels.last_used("channel_layer_norm"))
    """
    result = run_python(code)
    said, ran = result.stdout.strip().split("\n")
    assert said.startswith(reason), result.stderr
    assert (ran == "torch") == (module == "._native")
    warned = f"mirage_kernels{module}: {reason}. Build it again (make setup" in result.stderr
    assert warned == (how == "old"), result.stderr


@pytest.mark.parametrize(
    ("package", "version", "accepted"),
    [
        ("triton", "3.2.0", False),
        ("pytorch-triton-rocm", "3.3.1+gitc8757738", False),
        ("triton", "2.10.0", False),
        ("triton", "3.4.0", True),
        ("pytorch-triton", "3.10.0+git1234567", True),
        ("triton", "4.0.0", True),
        ("triton", "unknown", True),
        ("a-fork-of-triton", "0.1", True),
    ],
)
def test_a_triton_whose_compiler_fails_is_not_used(package, version, accepted, run_python):
    """It would end the process, so the version has to be seen before a kernel is compiled."""
    code = f"""
        import importlib.metadata, importlib.util
        find, ask = importlib.util.find_spec, importlib.metadata.version
        importlib.util.find_spec = lambda name, *a: True if name == "triton" else find(name, *a)
        def version(name):
            if name == {package!r}:
                return {version!r}
            if "triton" in name:
                raise importlib.metadata.PackageNotFoundError(name)
            return ask(name)
        importlib.metadata.version = version
        import torch, mirage_kernels
        from mirage_kernels._runtime import dispatch
        print(dispatch._problem("triton", "cuda") or "accepted")
        print(dispatch._automatic("cuda") == "triton")
    """
    said, chosen = run_python(code).stdout.strip().split("\n")
    assert chosen == str(accepted)
    expected = f"Triton {version} is too old: its compiler fails at some kernels, 3.4 or later is needed"
    assert said == ("accepted" if accepted else expected)


def test_importing_mirage_loads_no_kernels_and_no_triton(run_python):
    code = """
        import sys, mirage
        print(sorted(m for m in sys.modules if m.split(".")[0] in ("mirage_kernels", "triton")))
    """
    assert run_python(code).stdout.strip() == "[]"


def test_nothing_loads_the_compiler_of_pytorch(run_python):
    """Which takes a second, and is needed where something is compiled."""
    code = """
        import sys, torch, mirage_kernels
        before = "torch._dynamo" in sys.modules
        x = torch.ones(1, 2, 3, 3, requires_grad=True)
        mirage_kernels.channel_layer_norm(x, torch.ones(2), torch.ones(2)).sum().backward()
        print(before, "torch._dynamo" in sys.modules)
    """
    result = run_python(code)
    assert result.stdout.strip() == "False False", result.stderr


INSTRUCTION_SETS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16")


def test_instruction_sets_agree(run_python):
    """MIRAGE_CPU_ISA lowers the instruction set; results differ by rounding alone."""
    if mirage_kernels.available()["cpp"] != "yes":
        pytest.skip(mirage_kernels.available()["cpp"])
    code = """
        import torch, mirage_kernels
        from mirage_kernels import _native
        h = torch.randn(1, 6, 9, 21, generator=torch.Generator().manual_seed(0))
        w = torch.randn(6, 1, 3, 3, generator=torch.Generator().manual_seed(1))
        y = mirage_kernels.gated_depthwise_ffn(h, w)
        print(_native.cpu_isa(), *y.flatten().tolist())
    """
    results = {}
    for wish in INSTRUCTION_SETS:
        name, *values = run_python(code, MIRAGE_CPU_ISA=wish).stdout.split()
        results[name] = torch.tensor([float(v) for v in values])
    assert "baseline" in results
    for values in results.values():
        torch.testing.assert_close(values, results["baseline"], rtol=1e-5, atol=1e-6)


PRODUCTS_IN_BFLOAT16 = """
    import json, torch, mirage_kernels
    from mirage_kernels import _native
    from mirage_kernels.dense_conv2d import reference
    found = [_native.cpu_isa(), _native.why_no_tiles()]
    generator = torch.Generator().manual_seed(0)
    for channels, outputs, size in ((1, 1, 1), (31, 17, 1), (66, 33, 1), (97, 48, 1), (5, 15, 3), (34, 18, 3)):
        for pixels in ((1, 1), (3, 5), (7, 19)):
            x = torch.randn(2, channels, *pixels, generator=generator).bfloat16()
            w = torch.randn(outputs, channels, size, size, generator=generator)
            w = (w / (channels * size * size) ** 0.5).bfloat16()
            torch.set_num_threads(1)
            y = mirage_kernels.dense_conv2d(x, w)
            torch.set_num_threads(3)
            assert torch.equal(y, mirage_kernels.dense_conv2d(x, w)), (channels, outputs, size, pixels)
            exact = reference(x.double(), w.double())
            found.append(float((y.double() - exact).abs().max() / exact.abs().max()))
    print(json.dumps(found))
"""


@pytest.mark.parametrize("wish", INSTRUCTION_SETS)
def test_products_in_bfloat16_on_every_instruction_set(run_python, wish):
    """Rests of tiles, of registers and of pairs of channels: rounding to bfloat16 is the largest error."""
    if mirage_kernels.available()["cpp"] != "yes":
        pytest.skip(mirage_kernels.available()["cpp"])
    isa, reason, *errors = json.loads(run_python(PRODUCTS_IN_BFLOAT16, MIRAGE_CPU_ISA=wish).stdout)
    assert (isa == "amx_bf16") == (reason == "")
    if isa != wish:
        pytest.skip(f"this machine runs {isa} instead: {reason}")
    assert max(errors) <= 2**-8


def test_a_refused_permission_for_tiles_is_told(run_python):
    """Linux refuses them where a signal would find too small a stack; vectors are then used."""
    if mirage_kernels.available()["cpp"] != "yes":
        pytest.skip(mirage_kernels.available()["cpp"])
    from mirage_kernels import _native

    if _native.cpu_isa() != "amx_bf16":
        pytest.skip(_native.why_no_tiles())
    code = """
        import ctypes

        class Stack(ctypes.Structure):
            _fields_ = [("memory", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

        memory = ctypes.create_string_buffer(8192)
        stack = Stack(ctypes.addressof(memory), 0, len(memory))
        assert ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None) == 0
        import torch, mirage_kernels
        from mirage_kernels import _native
        x = torch.ones(1, 2, 3, 3, dtype=torch.bfloat16)
        print(_native.cpu_isa(), float(mirage_kernels.dense_conv2d(x, x[:, :, :1, :1]).sum()), _native.why_no_tiles())
    """
    isa, total, reason = run_python(code).stdout.split(maxsplit=2)
    assert isa.startswith("avx512") and float(total) == 18 and "refuses" in reason
