"""Links between pages, files that they name, and names that the reference has to list."""

from __future__ import annotations

import re

import pytest
from manual import EVERY_PAGE, ROOT, name, without_blocks

import mirage
import mirage.fast
import mirage_kernels

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\s]+\.(?:py|md|sh))(?::\d+)?`")
FOLDERS = ("mirage_kernels", "mirage", "csrc", "benchmarks", "tests", "tools")
PLACEHOLDERS = re.compile(r"[<>*]|\bNAME\b")


def broken_links(page, text) -> list[str]:
    """Relative links of a page that lead nowhere, anchors left aside (mkdocs looks at those)."""
    targets = [target for target in LINK.findall(without_blocks(text)) if "://" not in target]
    return [target for target in targets if not (page.parent / target.partition("#")[0]).exists()]


def missing_files(page, text) -> list[str]:
    """Files named in backticks that are neither in the repository nor beside the page; a bare name may be anywhere."""
    named = [path for path in CODE.findall(without_blocks(text)) if not PLACEHOLDERS.search(path)]
    beside = [path for path in named if not (ROOT / path).exists() and not (page.parent / path).exists()]
    return [path for path in beside if "/" in path or not any(next((ROOT / top).rglob(path), None) for top in FOLDERS)]


@pytest.mark.parametrize("page", EVERY_PAGE, ids=name)
def test_links_and_files_exist(page):
    text = page.read_text(encoding="utf-8")
    assert not broken_links(page, text)
    assert not missing_files(page, text)


def test_what_is_missing_is_found():
    page = ROOT / "README.md"
    links = "[a](docs/nowhere.md#x), [b](README.md), [c](https://example.org/x.md)"
    files = "`tools/nothing.py`, `<op>/op.py`, `setup.py`, `cpp.py`, `no_such_module.py`"
    assert broken_links(page, f"{links}, {files}") == ["docs/nowhere.md#x"]
    assert missing_files(page, f"{links}, {files}") == ["tools/nothing.py", "no_such_module.py"]


@pytest.mark.parametrize(("module", "page"), [(mirage, "mirage"), (mirage.fast, "fast"), (mirage_kernels, "kernels")])
def test_the_reference_lists_every_public_name(module, page):
    text = (ROOT / "docs" / "api" / f"{page}.md").read_text(encoding="utf-8")
    assert [public for public in module.__all__ if not re.search(rf"\b{public}\b", text)] == []


def test_the_first_page_leads_to_every_page():
    linked = {target.partition("#")[0] for target in LINK.findall((ROOT / "docs/index.md").read_text(encoding="utf-8"))}
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert pages - linked == set()


def test_every_extra_is_on_the_page_of_the_installation():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = project.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    extras = re.findall(r"^(\w+) = \[", table, re.MULTILINE)
    page = (ROOT / "docs/install.md").read_text(encoding="utf-8")
    assert "images" in extras and "dev" in extras
    assert [extra for extra in extras if f'".[{extra}]"' not in page and f"`{extra}`" not in page] == []
