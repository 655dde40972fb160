"""Every Python example of the README and the manual runs, in the order of its page, in one namespace a page."""

from __future__ import annotations

import warnings

import pytest
import torch
from manual import PAGES, examples, name

import mirage
import mirage_kernels

WITH_EXAMPLES = [page for page in PAGES if examples(page.read_text(encoding="utf-8"))]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to run in, but for the checkpoint that examples read."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save({"state_dict": mirage.mirage_tiny().state_dict()}, "mirage.ckpt")
    yield tmp_path
    mirage_kernels.release_workspace()


@pytest.fixture
def workspace_limit():
    """Examples change a limit of the process."""
    before = mirage_kernels.limit_workspace(1 << 30)
    mirage_kernels.limit_workspace(before)
    yield
    mirage_kernels.limit_workspace(before)


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=name)
def test_examples_run(page, folder, workspace_limit):
    namespace: dict = {"__name__": "example"}
    for example in examples(page.read_text(encoding="utf-8")):
        if example.not_run:
            continue
        for module in example.needs:
            pytest.importorskip(module)
        code = compile("\n" * (example.line - 1) + example.source, str(page), "exec")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(code, namespace)  # noqa: S102


def test_an_example_that_fails_fails_the_test_and_marks_are_read():
    text = (
        "a\n\n```python\nx = 1\n```\n\n<!-- not run: needs a GPU -->\n```python\ny\n```\n"
        "<!-- needs: onnx numpy -->\n\n```python\nraise ValueError(x)\n```\n```text\nno\n```\n"
    )
    first, second, third = examples(text)
    assert (first.line, first.source, first.not_run, first.needs) == (4, "x = 1\n", "", ())
    assert second.not_run == "needs a GPU" and third.needs == ("onnx", "numpy") and not third.not_run
    with pytest.raises(ValueError, match="1"):
        exec(compile(third.source, "page", "exec"), {"x": 1})


def test_the_manual_has_examples():
    assert {name(page) for page in WITH_EXAMPLES} >= {
        *("README.md", "docs/index.md", "docs/accelerate.md", "docs/train.md", "docs/restore.md", "docs/kernels.md"),
        *("docs/deployment.md", "docs/reporting.md"),
    }
