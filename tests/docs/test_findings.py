"""The scripts of findings/ have the form that their README describes. None is run."""

import re

import pytest
from manual import ROOT

SCRIPTS = sorted((ROOT / "findings").glob("*.sh"))


def head_of(script):
    lines = script.read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines[1 : next(i for i, line in enumerate(lines) if i and line[:1] != "#")])


def test_the_readme_lists_every_script_with_its_version():
    rows = re.findall(r"^\| \[(\S+)\]\((\S+)\) \| (.+?) \|", (ROOT / "findings/README.md").read_text("utf-8"), re.M)
    assert [name for name, _, _ in rows] == [script.name for script in SCRIPTS]
    for name, link, packages in rows:
        text = (ROOT / "findings" / name).read_text(encoding="utf-8")
        assert link == name
        assert all(version in text for version in re.findall(r"\d+\.\d[\d.]*", packages)), name


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_is_as_described(script):
    text, head = script.read_text(encoding="utf-8"), head_of(script)
    assert "Matters" in head and re.search(r"^# (Seen|Output seen)", head, re.M)
    assert "set -euo pipefail" in text and "mktemp -d" in text and "trap 'rm -rf" in text
    assert re.search(r"-m venv", text) and all("==" in line for line in text.splitlines() if "install --quiet" in line)
    assert not re.search(r"^\s*(import|from) (mirage|mirage_kernels)\b", text, re.M), "without this project"
    assert "changed" in text, "it exits with 1 once the behaviour has changed"
    assert not re.search(r"^assert .*__version__", text, re.M), "a newer version with the same behaviour is no change"
    assert max(map(len, text.splitlines())) <= 120
