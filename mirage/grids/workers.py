"""Trainings of several groups at once: in a bounded number of processes of this machine, or on a cluster of Ray."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from mirage.extras import not_there

__all__ = ["ENGINES", "Stopped", "Workers", "default_workers"]

ENGINES = ("local", "ray")
RETRIES = 3  # of a worker of Ray that was killed; its training goes on from its checkpoint

Result = tuple[int, Any]
"""Number of the item, and what the function gave, or the error."""


class Stopped(KeyboardInterrupt):
    """Trainings were told to stop; what was going on is saved."""


def default_workers() -> int:
    """One a GPU; without GPUs one."""
    import torch

    return max(1, torch.cuda.device_count()) if torch.cuda.is_available() else 1


@dataclass(frozen=True)
class Workers:
    """Calls a function for each of several items, a bounded number of them at a time.

    Args:
        count: at a time, at most; None: one a GPU, and without GPUs one (with Ray one for each four CPUs of a machine).
            Of this machine one works in this process. Several are processes of their own, with a GPU each where there
            are GPUs, and with the CPUs divided among them.
        engine: ``"local"``, or ``"ray"``: the machines of a cluster, which all reach the same folders.
        address: of the cluster; None: that of ``RAY_ADDRESS``, else Ray on this machine alone.
        cpus: of each worker of Ray, where there are no GPUs.

    Raises:
        ValueError: an argument makes no sense.
        ImportError: Ray is asked for and not installed.
    """

    count: int | None = None
    engine: str = "local"
    address: str | None = None
    cpus: int | None = None

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ValueError(f"engine: expected one of {', '.join(ENGINES)}, got {self.engine!r}")
        if self.count is not None and self.count < 1:
            raise ValueError(f"workers: expected 1 or more, got {self.count}")
        missing = not_there("ray", "ray") if self.engine == "ray" else None
        if missing is not None:
            raise ImportError(missing)

    @property
    def parallel(self) -> int:
        """How many are worked on at a time, as far as that is known here."""
        return self.count or (default_workers() if self.engine == "local" else 1)

    def run(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Result]:
        """Call ``function``, which other processes can import, for each item.

        Yields:
            An item's number and its result or error, as they come.

        Raises:
            Stopped: Ctrl-C, or a training was told to stop; the others have stopped too, and have saved what they had.
        """
        if self.engine == "ray":
            return _on_ray(function, items, self)
        if min(self.parallel, len(items)) <= 1:
            return _here(function, items)
        return _in_processes(function, items, min(self.parallel, len(items)))


def _called(function: Callable[[Any], Any], item: Any) -> tuple[Any, Exception | None]:
    """What a function gives, and its error; that it was told to stop counts as none."""
    from mirage.train import Interrupted

    try:
        return function(item), None
    except Interrupted as error:
        raise Stopped(str(error)) from error
    except Exception as error:  # one group's training fails: the others' are still worth having
        return None, error


def _here(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Result]:
    for number, item in enumerate(items):
        value, error = _called(function, item)
        yield number, value if error is None else error


# --- processes of this machine


def _in_processes(function: Callable[[Any], Any], items: Sequence[Any], count: int) -> Iterator[Result]:
    """Processes that end with this one, and that save what they have when it is told to stop."""
    context = multiprocessing.get_context("spawn")  # a fork would share locks of threads, and a GPU's context
    slots = context.Queue()
    for number in range(count):
        slots.put(number)
    threads = max(1, (os.cpu_count() or 1) // count)
    # Closing `this_end` tells every process to stop, one that is still being started as well; the system closes it
    # where this process is killed.
    their_end, this_end = context.Pipe(duplex=False)
    with their_end, this_end, ProcessPoolExecutor(count, context, _begin, (slots, their_end, threads)) as pool:
        pending: dict[Future[Any], int] = {}
        try:
            for number, item in enumerate(items):
                pending[pool.submit(_in_process, function, item)] = number
            while pending:
                done, _ = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    yield pending.pop(future), _outcome(future)
        except BaseException:
            this_end.close()
            for future in pending:
                future.cancel()
            raise


def _outcome(future: Future[Any]) -> Any:
    error = future.exception()
    if isinstance(error, BrokenProcessPool):
        return RuntimeError(
            "its process was ended from outside, which may mean that memory ran out: fewer workers need less, and "
            "another run goes on from what is done"
        )
    if isinstance(error, KeyboardInterrupt):
        raise Stopped(str(error))
    return future.result() if error is None else error


_told_to_stop = _busy = False
SECONDS_TO_TELL = 2.0  # that a process has for sending what became of its item, once it was told to stop
SECONDS_TO_STOP = 5.0  # until a process that was told to stop is told again


def _begin(slots: Any, end_of_pipe: Connection, threads: int) -> None:
    """What each process does first."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process decides, and says so by closing the pipe
    signal.signal(signal.SIGTERM, _stop)
    threading.Thread(target=_stop_when_closed, args=(end_of_pipe,), daemon=True).start()
    slot = slots.get()
    torch.set_num_threads(threads)
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if os.environ.get("CUDA_VISIBLE_DEVICES") else []
    gpus = gpus or [str(i) for i in range(torch.cuda.device_count())]
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]  # read when CUDA is first used, which is later


def _stop(number: int, frame: Any) -> None:
    """Outside of a training's steps, where the trainer does not listen itself: nothing is lost by an end."""
    global _told_to_stop
    _told_to_stop = True
    if not _busy:
        os._exit(0)
    raise Stopped("stopped")


def _stop_when_closed(end_of_pipe: Connection) -> None:
    end_of_pipe.poll(None)
    while True:  # what `_stop` raises is lost where Python ignores errors, as in a finalizer
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(SECONDS_TO_STOP)


def _in_process(function: Callable[[Any], Any], item: Any) -> Any:
    global _told_to_stop, _busy
    if _told_to_stop:  # the pool hands one item more to each process than can be taken back
        raise Stopped("stopped")
    _busy = True
    try:
        value, error = _called(function, item)
    except Stopped:
        _told_to_stop = True
        timer = threading.Timer(SECONDS_TO_TELL, os._exit, [0])  # a pool that is broken tells nobody to end
        timer.daemon = True
        timer.start()
        raise
    finally:
        _busy = False
    if error is not None:
        raise error
    return value


# --- a cluster of Ray


def _on_ray(function: Callable[[Any], Any], items: Sequence[Any], workers: Workers) -> Iterator[Result]:
    import ray

    from mirage.distributed.cluster import connected, share_out

    with connected(workers.address):
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        sizes = [(int(one.get("CPU", 0)), int(one.get("GPU", 0))) for one in machines]
        share = share_out(sizes, workers.count, workers.cpus)
        resources = {"num_gpus": share.gpus} if share.gpus else {"num_cpus": share.cpus}
        remote = ray.remote(_on_machine).options(max_retries=RETRIES, **resources)
        waiting = list(enumerate(items))[::-1]
        pending: dict[Any, int] = {}
        try:
            while waiting or pending:
                while waiting and len(pending) < share.workers:
                    number, item = waiting.pop()
                    pending[remote.remote(function, item, share.cpus)] = number
                [done], _ = ray.wait(list(pending), num_returns=1)
                yield pending.pop(done), _fetched(done)
        except BaseException:
            for reference in pending:
                ray.cancel(reference)
            raise


def _fetched(reference: Any) -> Any:
    import ray

    try:
        value, error = ray.get(reference)
    except ray.exceptions.RayError as failure:
        return RuntimeError(f"Ray gave it up: {str(failure).splitlines()[0]}")
    if isinstance(error, KeyboardInterrupt):
        raise Stopped(str(error))
    return value if error is None else error


def _on_machine(function: Callable[[Any], Any], item: Any, threads: int) -> tuple[Any, BaseException | None]:
    import torch

    if threads:
        torch.set_num_threads(threads)
    try:
        return _called(function, item)
    except Stopped as error:
        return None, error
    finally:
        sys.stdout.flush()
