"""What other programs say: compute-sanitizer over the CUDA kernels, and tests of this repository."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import torch

import mirage_kernels
from mirage_kernels._runtime import accuracy
from mirage_kernels._runtime.cases import operators
from tools.first_light import truth
from tools.first_light.pool import Row

ROOT = Path(__file__).resolve().parents[2]
CASE = "first light case: "
"""What begins the line that a sanitized program writes before each of its cases."""
ERRORS = 17
"""Exit status of compute-sanitizer where it found some."""


def sanitizer(names: list[str], dtypes: list[str], device: str, without: bool = False) -> Iterator[Row]:
    """memcheck over one case of each of the operators in CUDA C++. `without`: the same program by itself, where there
    is no GPU that the tool could watch."""
    if absent := truth.missing("cuda"):
        yield absent
        return
    tool = shutil.which("compute-sanitizer")
    if tool is None and not without:
        yield {"status": "left out", "problem": "there is no compute-sanitizer"}
        return
    program = [sys.executable, "-m", "tools.first_light.safety", json.dumps([names, dtypes, device])]
    options = ["--tool", "memcheck", "--error-exitcode", str(ERRORS), "--print-limit", "20"]
    done = subprocess.run(
        program if without or tool is None else [tool, *options, *program],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # whose blocks are larger than what is asked for
        check=False,
    )
    yield from read_sanitizer(done.stdout, done.returncode, watched=not without)


def read_sanitizer(output: str, status: int, watched: bool = True) -> Iterator[Row]:
    """A row for each case that the output tells of, with what was found in it, and one where it broke off."""
    _, *cases = re.split(f"^{CASE}", output, flags=re.M)
    for text in cases:
        name, _, said = text.partition("\n")
        found = [line.removeprefix("=========").strip() for line in said.splitlines() if line.startswith("=========")]
        errors = [line for line in found if re.match(r"(Invalid|Misaligned|Program hit|Error|Uninit)", line)]
        row: Row = {"case": name.strip()}
        if errors:
            row |= {"status": "wrong", "problem": "; ".join(errors[:3]), "errors": len(errors)}
        yield row
    summary = re.search(r"ERROR SUMMARY: (\d+) errors?", output)
    problem = ""
    if watched and summary is None:
        problem = "no summary"
    elif summary is not None and int(summary[1]):
        problem = summary[0]
    elif status:
        problem = f"exit status {status}"
    if problem:
        end = output.strip()[-400:]
        yield {
            "case": "all",
            "status": "wrong" if summary and int(summary[1]) else "failed",
            "problem": f"{problem}: {end}",
        }


def run_cases(names: list[str], dtypes: list[str], device: str) -> None:
    """One case of each operator, forward and backward, in CUDA C++, with a line before it."""
    for case in operators(names):
        for dtype in dtypes:
            print(f"{CASE}{case.name} {case.mode} {dtype}", flush=True)
            inputs = case.inputs(case.shapes[0], getattr(torch, dtype), device)
            with mirage_kernels.use("cuda"):
                tensors = [t.requires_grad_(case.gradients) for t in inputs]
                accuracy.evaluate(case.public, tensors, differentiate=case.gradients)
            if device == "cuda":
                torch.cuda.synchronize()


def tests(targets: list[str], words: str, device: str) -> Iterator[Row]:
    """Tests of this repository, a row each."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-q", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
        command += ["-p", "no:cacheprovider", "--junitxml", str(report), "-k", words]
        command += ["-m", "gpu" if device == "cuda" else "not slow"]
        done = subprocess.run(
            [*command, *(str(ROOT / target) for target in targets)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        rows = list(read_tests(report.read_text())) if report.is_file() else []
    yield from rows
    if not rows:
        yield {"status": "failed", "problem": f"no test ran, exit status {done.returncode}: {done.stdout[-400:]}"}


def read_tests(xml: str) -> Iterator[Row]:
    """The rows of a report in JUnit's format."""
    for case in ElementTree.fromstring(xml).iter("testcase"):
        row: Row = {"case": f"{case.get('classname', '').rpartition('.')[2]} {case.get('name')}"}
        for tag, status in (("failure", "wrong"), ("error", "failed"), ("skipped", "left out")):
            if (found := case.find(tag)) is not None:
                row |= {"status": status, "problem": (found.get("message") or "")[:400]}
        yield row


KINDS = {"sanitizer": sanitizer, "tests": tests}

if __name__ == "__main__":
    run_cases(*json.loads(sys.argv[1]))
