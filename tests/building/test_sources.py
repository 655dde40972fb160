"""What the compiler cannot see because it compiles one file at a time."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

SOURCES = Path(__file__).parents[2] / "csrc"


def defined(path: Path) -> set[str]:
    """Structs and classes of a file's namespaces, each with its namespace; those of unnamed ones are the file's own."""
    spaces: list[str] = []
    found: set[str] = set()
    for line in path.read_text(encoding="utf-8").splitlines():
        opened = re.match(r"namespace ([\w:]*) ?\{(?!.*\})", line)
        if opened:
            spaces.append(opened[1] or f"({path})")
        elif line.startswith("}  // namespace") and spaces:
            spaces.pop()
        elif kind := re.match(r"(?:struct|class) (\w+)\b(?!<)[^;]*(?:\{|$)", line):  # neither declared nor specialised
            found.add("::".join([*spaces, kind[1]]))
    return found


def test_no_two_files_define_a_class_of_one_name():
    """The linker keeps one of two inline functions of one name, whichever class it is of."""
    files = defaultdict(list)
    for path in sorted(SOURCES.rglob("*")):
        if path.suffix in (".h", ".cpp", ".cu") and "examples" not in path.parts and "tests" not in path.parts:
            for name in defined(path):
                files[name].append(str(path.relative_to(SOURCES)))
    assert len(files) > 100
    assert {name: places for name, places in files.items() if len(places) > 1} == {}


def test_it_would_be_seen(tmp_path):
    unnamed = "namespace a {\nnamespace {\nclass S {\n};\n}  // namespace\n"
    texts = ("namespace a {\nstruct S {\n};\n}  // namespace a\n", unnamed)
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.h").write_text(text)
    assert defined(tmp_path / "0.h") == {"a::S"} and defined(tmp_path / "1.h") == {f"a::({tmp_path / '1.h'})::S"}
    (tmp_path / "2.h").write_text("namespace a {\nstruct S;\ntemplate <>\nstruct T<int> {\n};\n}  // namespace a\n")
    assert defined(tmp_path / "2.h") == set()
