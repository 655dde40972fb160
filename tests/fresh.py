"""Fresh processes for tests of what happens as one starts: each begins with PyTorch imported and nothing of ours.

Importing PyTorch takes most of the time of a small process. So one process imports it and waits; a program runs in a
child that it forks, with the environment and the arguments given.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping

FORKS = sys.platform == "linux"
"""Elsewhere a fork of a process with PyTorch in it may not be able to go on."""
WAITING = """
import json, os, sys
import torch
for line in sys.stdin:
    code, arguments, environment, *files = json.loads(line)
    child = os.fork()
    if child == 0:
        for number, path in enumerate(files, 1):
            os.dup2(os.open(path, os.O_WRONLY), number)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = ["-c", *arguments]
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Fresh:
    """Runs programs one after the other, each in a process of its own."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(
        self, code: str, *arguments: object, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """As ``python -c code *arguments``, on the path of this process; `environment` in the place of its own."""
        given = {**(os.environ if environment is None else environment), "PYTHONPATH": _path()}
        words = list(map(str, arguments))
        if not FORKS:
            return subprocess.run([sys.executable, "-c", code, *words], env=given, capture_output=True, text=True)
        with tempfile.TemporaryDirectory() as folder:
            files = [os.path.join(folder, name) for name in ("out", "err")]
            for path in files:
                open(path, "w").close()
            status = self._ask(json.dumps([code, words, given, *files]))
            written = []
            for path in files:
                with open(path) as file:
                    written.append(file.read())
        return subprocess.CompletedProcess([sys.executable, "-c", code, *words], status, *written)

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate()
            self._process = None

    def _ask(self, job: str) -> int:
        if self._process is None:
            command, environment = [sys.executable, "-c", WAITING], {**os.environ, "PYTHONPATH": _path()}
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        print(job, file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())


def _path() -> str:
    return os.pathsep.join(path for path in sys.path if path)
