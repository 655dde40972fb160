"""What each worker of a job does: read, decode, restore, encode, write, file by file.

The next file is read and decoded while the network works on one, and the one before is encoded and written.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from mirage.distributed.manifest import FAILED, RESTORED, Record
from mirage.distributed.places import Place, retrying
from mirage.distributed.plan import Task

__all__ = ["RayWorker", "Worker", "WorkerOptions"]

MEMORY_SHARE = 0.8
"""Of a machine's free memory, for all its workers."""

DEATHS = 3
"""A file that was being worked on when its worker died, this many times, has failed."""


@dataclass(frozen=True)
class WorkerOptions:
    """What all workers of a job share.

    Attributes:
        inputs, out: places, as `Task` counts them.
        run: name of the run, part of temporary names.
        restorer: arguments of `mirage.Restorer` beside the weights.
        format, quality, max_pixels: as for ``mirage restore``.
        retries: of reading and writing a file, after errors that may pass.
        threads: of the CPU for one worker; 0 leaves PyTorch's own choice.
        neighbours: workers that a machine has at most.
    """

    inputs: tuple[Place, ...]
    out: Place
    run: str
    restorer: Mapping[str, Any] = field(default_factory=dict)
    format: str = "same"
    quality: int = 95
    max_pixels: int | None = None
    retries: int = 3
    threads: int = 0
    neighbours: int = 1


@dataclass
class _Work:
    """A file on its way through a worker; ``seconds`` without the time it waited for others."""

    index: int
    task: Task
    attempt: int = 0
    seconds: float = 0.0
    image: Any = None
    error: str | None = None
    notes: tuple[str, ...] = ()


class Worker:
    """Restores batches of tasks, in a process that lives as long as the job.

    Args:
        restorer: maps the pixels of an image to restored ones: a `mirage.Restorer`.
        options: what all workers share.
        ledger: a `Ledger`, or what has its methods.
    """

    def __init__(self, restorer: Callable[[Any], Any], options: WorkerOptions, ledger: Any):
        self.restorer, self.options, self.ledger = restorer, options, ledger
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        self.readers = ThreadPoolExecutor(1, "read")
        self.writers = ThreadPoolExecutor(1, "write")

    def __call__(self, batch: Any) -> Any:
        """Restore the files of a table of tasks (`as_block`); returns how many they are."""
        import pyarrow as pa

        rows = [row for tasks in batch["tasks"].to_pylist() for row in tasks]
        work = [_Work(row.pop("index"), Task(**row)) for row in rows]
        done, begun = self.ledger.look([one.index for one in work])
        left = [one for one in work if one.index not in set(done)]
        if begun:  # a worker died here: one file at a time, so that the next death says which it was
            for one in left:
                self._finish(self._restore(self._begin(one)))
        else:
            self._restore_overlapped(left)
        return pa.table({"files": [len(work)]})

    def _restore_overlapped(self, work: list[_Work]) -> None:
        ends: list[Future] = []
        for one in self._ahead(work):
            if ends:
                ends.pop().result()
            ends.append(self.writers.submit(self._finish, self._restore(one)))
        for end in ends:
            end.result()

    def _ahead(self, work: list[_Work]) -> Iterator[_Work]:
        """The files, read and decoded; one ahead."""
        coming: Future | None = None
        for one in work:
            following = self.readers.submit(self._begin, one)
            if coming is not None:
                yield coming.result()
            coming = following
        if coming is not None:
            yield coming.result()

    def _begin(self, one: _Work) -> _Work:
        """Read and decode; errors are kept in the result, as in the next two."""
        one.attempt = self.ledger.begin(one.index)
        if one.attempt >= DEATHS:
            one.error = f"its worker died {one.attempt} times at this file (out of memory, or a fault of a library)"
            return one
        with _Step(one):
            one.image = self._decode(one.task)
            one.notes = tuple(one.image.notes)
        return one

    def _decode(self, task: Task) -> Any:
        from mirage import images

        place = self.options.inputs[task.root]
        data = retrying(lambda: place.read(task.path), self.options.retries)
        limit = self.options.max_pixels
        return images.decode_image(data, **({} if limit is None else {"max_pixels": limit}))

    def _restore(self, one: _Work) -> _Work:
        from mirage.restore.budget import release_memory

        if one.error is None:
            with _Step(one):
                one.image = one.image.with_pixels(self.restorer(one.image.pixels))
            if one.error is not None:
                release_memory()  # the next file shall not fail for what this one left
        return one

    def _finish(self, one: _Work) -> None:
        """Encode, write, and tell the ledger."""
        from mirage import images

        options, task, size = self.options, one.task, (0, 0)
        if one.image is not None:
            size = one.image.pixels.shape[1::-1]
        if one.error is None:
            with _Step(one):
                format = None if options.format == "same" else options.format
                data, notes = images.encode_with_notes(one.image, format, quality=options.quality)
                one.notes += notes
                for attempt in range(one.attempt):
                    options.out.remove_temporary(task.target, f"{options.run}.{attempt}")
                write = lambda: options.out.write(task.target, data, f"{options.run}.{one.attempt}")  # noqa: E731
                retrying(write, options.retries)
        one.image = None
        record = Record(
            input=options.inputs[task.root].name(task.path),
            output=options.out.name(task.target),
            status=RESTORED if one.error is None else FAILED,
            seconds=round(one.seconds, 4),
            error=one.error,
            notes=one.notes,
            size=task.size,
            version=task.version,
            width=size[0],
            height=size[1],
            worker=self.name,
            finished=datetime.now(timezone.utc),
        )
        self.ledger.end(one.index, record)


class RayWorker(Worker):
    """What Ray Data builds and calls.

    Args:
        network: a list of one reference of Ray to the network. Ray fetches what stands as an argument itself, and would
            hold a copy for each worker.
        options: what all workers share.
        ledger: handle of the `Ledger` actor.
    """

    def __init__(self, network: list[Any], options: WorkerOptions, ledger: Any):
        import ray
        import torch

        if options.threads:
            torch.set_num_threads(options.threads)
        super().__init__(_restorer(ray.get(network[0]), options), options, _RemoteLedger(ledger))


def _restorer(network: Any, options: WorkerOptions) -> Any:
    """The network on this worker's device; several workers of a machine share its memory."""
    import mirage
    from mirage.memory import available_memory
    from mirage.restore.loading import resolve_device

    arguments = dict(options.restorer)
    arguments["device"] = resolve_device(arguments.get("device", "auto"))
    free = available_memory()
    if arguments["device"].type == "cpu" and free is not None:
        arguments.setdefault("memory", int(free.bytes * MEMORY_SHARE / options.neighbours))
    return mirage.Restorer(network, **arguments)


class _RemoteLedger:
    """The ledger's methods as calls of its actor, which are answered before the work goes on."""

    def __init__(self, actor: Any):
        self.actor = actor

    def look(self, indices: list[int]) -> tuple[list[int], dict[int, int]]:
        import ray

        return ray.get(self.actor.look.remote(indices))

    def begin(self, index: int) -> int:
        import ray

        return ray.get(self.actor.begin.remote(index))

    def end(self, index: int, record: Record) -> None:
        import ray

        ray.get(self.actor.end.remote(index, record))


class _Step:
    """Times a step of a file's work, and keeps its error as a sentence: whatever one file does, others are tried."""

    def __init__(self, one: _Work):
        self.one = one

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        self.one.seconds += time.perf_counter() - self.start
        if not isinstance(error, Exception):
            return False
        self.one.error = _describe(error)
        return True


def _describe(error: Exception) -> str:
    from mirage.images import ImageError

    if isinstance(error, ImageError):
        return str(error)
    what = str(error) or ("out of memory" if isinstance(error, MemoryError) else "no message")
    return f"{type(error).__name__}: {what}"
