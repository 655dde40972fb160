"""Where an optional library is missing, whatever asks for it names its package and the extra that brings it."""

import sys

import pytest
from click.testing import CliRunner

import mirage.cli
from mirage.extras import is_there, not_there


def test_packages_are_called_as_pip_calls_them(monkeypatch):
    for module in ("PIL", "yaml", "skimage", "braceexpand"):
        monkeypatch.setitem(sys.modules, module, None)
    assert not is_there("PIL") and is_there("numpy") and not is_there("no_such_module")
    assert not_there("train", "numpy", "click") is None
    assert not_there("train", "numpy", "PIL", "yaml", "braceexpand") == (
        "pillow, pyyaml, braceexpand not installed; try: pip install 'mirage-kernels[train]'"
    )


@pytest.mark.parametrize(
    "arguments, missing, extra",
    [
        ("train 3deg-tiny", "lightning_fabric", "train"),
        ("demo", "gradio", "demo"),
        ("table6", "PIL", "table6"),
        ("evaluate --set a=b --method nlm", "skimage", "evaluate"),
        ("analyze a --weights b -o c", "matplotlib", "evaluate"),
        ("restore a --weights b -o c", "tifffile", "images"),
        ("degrade a -o b", "imagecodecs", "images"),
    ],
)
def test_commands_say_what_to_install(arguments, missing, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    result = CliRunner().invoke(mirage.cli.main, arguments.split())
    sentence = not_there(extra, missing)
    assert sentence is not None and sentence.endswith(f"pip install 'mirage-kernels[{extra}]'")
    assert result.exit_code == 1 and sentence in result.output


def test_python_functions_say_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "gradio", None)
    from mirage import distributed
    from mirage.demo.page import serve

    with pytest.raises(ImportError, match=r"^ray.* not installed; try: pip install 'mirage-kernels\[ray\]'$"):
        distributed.restore(tmp_path, tmp_path / "out", None)
    with pytest.raises(ImportError, match=r"^gradio not installed; try: pip install 'mirage-kernels\[demo\]'$"):
        serve(None)
