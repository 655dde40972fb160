"""Tasks in processes of their own, each with a time limit.

A process takes one task after the other, since importing PyTorch takes seconds; where one crashes, hangs or leaves the
GPU unusable, the next task gets a fresh one.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
STARTING = 90.0
"""Seconds that a process may take to import PyTorch, which is not time of its first task."""
PROGRAM = ("-m", "tools.first_light.worker")
"""What Python runs in a process: see `worker.main` for its end of the pipe."""
END_OF_LOG = 800
"""Characters of what a crashed process has written that go into its row."""


@dataclass(frozen=True)
class Task:
    """One thing to run: a function of a worker (`worker.KINDS`) with arguments of plain JSON, in so many seconds."""

    part: str
    kind: str
    arguments: Mapping[str, Any]
    seconds: float

    def row(self, found: Row) -> Row:
        """What came of it, with what it was."""
        return {"part": self.part, "kind": self.kind, **self.arguments, **found}


class Ended(Exception):
    """The process of a task is gone; the message says how."""


class Worker:
    """A process that runs tasks.

    Raises:
        Ended, TimeoutError: it did not start.
    """

    def __init__(
        self, environment: Mapping[str, str], folder: Path, deadline: float, program: tuple[str, ...] = PROGRAM
    ) -> None:
        self.usable = True
        self._log = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._answers, theirs = os.pipe()
        self._unread = b""
        self._process = subprocess.Popen(
            [sys.executable, *program, str(theirs)],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            pass_fds=(theirs,),
            env=dict(environment),
            cwd=folder,
            start_new_session=True,  # killed together with what it starts
        )
        os.close(theirs)
        try:
            if self._message(deadline) is None:
                raise self._ended()
        except BaseException:
            self.close(kill=True)
            raise

    def run(self, task: Task, deadline: float) -> Iterator[Row]:
        """The rows of a task, as they come.

        Raises:
            Ended: the process did, on the way.
            TimeoutError: the time is over.
        """
        request = json.dumps({"kind": task.kind, "arguments": dict(task.arguments)})
        try:
            self._process.stdin.write(request.encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._ended() from None
        while (message := self._message(deadline)) is not None:
            if "row" not in message:
                self.usable = message["usable"]
                return
            yield message["row"]
        raise self._ended()

    def close(self, kill: bool = False) -> None:
        """End the process, at once with `kill`."""
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        if not kill:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)  # longer where a driver holds it; then nobody waits for it
        os.close(self._answers)
        self._log.close()

    def _message(self, deadline: float) -> Row | None:
        """The next line that it says; None where it has ended."""
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._answers], [], [], left)[0]:
                raise TimeoutError
            data = os.read(self._answers, 1 << 16)
            if not data:
                return None
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return json.loads(line)

    def _ended(self) -> Ended:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        status = self._process.returncode
        how = "ended" if status is None else f"exit status {status}"
        if status is not None and status < 0:
            with contextlib.suppress(ValueError):
                how = signal.Signals(-status).name
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - END_OF_LOG))
        return Ended(f"{how}: {self._log.read().decode(errors='replace').strip()}")


class Pool:
    """Runs tasks in some processes.

    Args:
        environment: of the processes.
        folder: that they are started in, and where they may leave files.
        record: is handed each row of a task; from several threads, one at a time.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        folder: Path,
        record: Callable[[Row], None],
        program: tuple[str, ...] = PROGRAM,
    ) -> None:
        self._environment, self._folder, self._record, self._program = environment, folder, record, program
        self._lock = threading.Lock()

    def run(self, tasks: Iterable[Task], workers: int, deadline: float) -> None:
        """All tasks in their order, by so many processes, until the clock (`time.monotonic`) is at the deadline; what
        has not begun then is a row that says so."""
        queue = deque(tasks)
        workers = max(1, min(workers, len(queue)))
        with ThreadPoolExecutor(workers) as threads:
            for future in [threads.submit(self._work, queue, deadline) for _ in range(workers)]:
                future.result()

    def _work(self, queue: deque[Task], deadline: float) -> None:
        worker: Worker | None = None
        try:
            while True:
                with self._lock:
                    if not queue:
                        return
                    task = queue.popleft()
                if time.monotonic() >= deadline:
                    self._say(task, {"status": "not reached", "problem": "the time of its part was over"})
                    continue
                worker = self._run(task, worker, deadline)
        finally:
            if worker is not None:
                worker.close()

    def _run(self, task: Task, worker: Worker | None, deadline: float) -> Worker | None:
        """Run one task; the process for the next, None where that has to be another."""
        start, limit = time.monotonic(), STARTING
        try:
            if worker is None:
                limit = min(STARTING, deadline - start)
                worker = Worker(self._environment, self._folder, start + limit, self._program)
            start = time.monotonic()
            limit = min(task.seconds, deadline - start)
            for row in worker.run(task, start + limit):
                self._say(task, row)
            if worker.usable:
                return worker
        except TimeoutError:
            cut = "" if limit >= task.seconds else ", where the time of its part was over"
            self._say(
                task, {"status": "timed out", "problem": f"no result after {time.monotonic() - start:.0f} s{cut}"}
            )
        except Ended as end:
            self._say(task, {"status": "crashed", "problem": str(end)})
        if worker is not None:
            worker.close(kill=True)
        return None

    def _say(self, task: Task, found: Row) -> None:
        with self._lock:
            self._record(task.row(found))
