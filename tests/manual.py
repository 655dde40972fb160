"""The pages of the manual, and what tests want to know of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EVERY_PAGE = [
    *PAGES,
    *sorted((ROOT / "docs" / "api").glob("*.md")),
    *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "findings/README.md")),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!-- (not run|needs): (.+?) -->\s*\Z")


@dataclass(frozen=True)
class Example:
    """A block of Python on a page.

    Attributes:
        line: of its first line on the page.
        not_run: why it is not run, where the comment before it says so.
        needs: modules that it imports besides the package's own, where the comment before it says so.
    """

    line: int
    source: str
    not_run: str = ""
    needs: tuple[str, ...] = ()


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def examples(text: str) -> list[Example]:
    """The blocks marked as Python, in order."""
    found = []
    for block in FENCE.finditer(text):
        language, source = block.groups()
        if language != "python":
            continue
        mark = MARK.search(text[: block.start()])
        kind, rest = mark.groups() if mark else ("", "")
        found.append(
            Example(
                line=text.count("\n", 0, block.start(2)) + 1,
                source=source,
                not_run=rest if kind == "not run" else "",
                needs=tuple(rest.split()) if kind == "needs" else (),
            )
        )
    return found


def without_blocks(text: str) -> str:
    """The prose: fenced and indented blocks left out."""
    text = FENCE.sub("", text)
    return "\n".join(line for line in text.splitlines() if not line.startswith("    "))
