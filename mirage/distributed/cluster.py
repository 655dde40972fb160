"""What is asked of Ray: a connection, a share of the machines for each worker, and the batches done by them."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from mirage.distributed.ledger import Ledger
from mirage.distributed.manifest import Record
from mirage.distributed.worker import RayWorker, WorkerOptions

__all__ = ["Share", "connected", "restore_batches", "share_out"]

CPUS = 4
"""Of a worker on the CPU, by default: a network's pass gains little from more, two workers gain twice."""
POLL = 0.5  # seconds between looks at the ledger


@dataclass(frozen=True)
class Share:
    """How many workers there are, and the CPUs and GPUs of each."""

    workers: int
    cpus: int
    gpus: int


def share_out(
    machines: Sequence[tuple[int, int]], workers: int | None, cpus: int | None, use_gpus: bool = True
) -> Share:
    """Divide machines among workers.

    Args:
        machines: CPUs and GPUs of each.
        workers: how many are asked for; by default one a GPU, or one for each ``cpus`` CPUs of a machine.
        cpus: of each worker; by default 4, or what there are where ``workers`` says how many. GPU workers get none
            for themselves: Ray's advice is to ask for one of the two kinds.
        use_gpus: False leaves them alone.

    Raises:
        ValueError: there are not as many GPUs or CPUs as that takes.
    """
    for name, value in (("workers", workers), ("cpus", cpus)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected 1 or more, got {value}")
    gpus = sum(machine[1] for machine in machines) if use_gpus else 0
    if gpus:
        if workers is not None and workers > gpus:
            raise ValueError(f"workers: expected at most {gpus}, a GPU each, got {workers}")
        return Share(workers or gpus, 0, 1)
    most = max((machine[0] for machine in machines), default=0)

    def fitting(each: int) -> int:
        return sum(machine[0] // each for machine in machines)

    if cpus is None:
        enough = (
            [each for each in range(most, 0, -1) if fitting(each) >= workers]
            if workers is not None
            else [min(CPUS, most)]
        )
        cpus = enough[0] if enough and enough[0] else 1
    if fitting(cpus) < (workers or 1):
        what = f"{workers or 1} with {cpus} CPUs each"
        raise ValueError(f"workers: the machines' CPUs are enough for {fitting(cpus)} with {cpus} each, got {what}")
    return Share(workers or fitting(cpus), cpus, 0)


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """A connection to the cluster, closed at the end unless it was there before; a cluster of ours reports nothing."""
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    local: dict[str, Any] = {}
    if not (address or os.environ.get("RAY_ADDRESS")):
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else a line at each start, of an error that is none
        local = {"include_dashboard": False}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
    except ConnectionError as error:
        raise ValueError(f"address: no cluster of Ray at {address!r}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def restore_batches(
    blocks: list[Any],
    network: Any,
    options: WorkerOptions,
    share_of: Callable[[Sequence[tuple[int, int]]], Share],
    take: Callable[[Record], None],
    tick: Callable[[], None],
) -> None:
    """Have the workers of the connected cluster restore all batches.

    Args:
        blocks: from `mirage.distributed.plan.as_block`.
        share_of: from the machines' CPUs and GPUs to the workers'.
        take: gets each record, from another thread, one at a time.
        tick: called there twice a second.

    Raises:
        Exception: what ``take`` raised, or Ray where it gives up: no worker can start, the driver's machine fails.
    """
    import ray
    import ray.data
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    sizes = [(int(one.get("CPU", 0)), int(one.get("GPU", 0))) for one in machines]
    share = share_of(sizes)
    most = max(gpus // share.gpus if share.gpus else cpus // share.cpus for cpus, gpus in sizes)
    options = replace(options, threads=share.cpus, neighbours=max(1, min(most, share.workers)))
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    ledger = ray.remote(Ledger).options(num_cpus=0, scheduling_strategy=here).remote()
    shared = ray.put(network)
    resources = {"num_gpus": share.gpus} if share.gpus else {"num_cpus": share.cpus}
    with _quiet(), _Polling(ledger, take, tick) as polling:
        data = ray.data.from_blocks(blocks).map_batches(
            RayWorker,
            fn_constructor_args=([shared], options, ledger),
            batch_size=1,  # a row is a batch of files: Ray Data neither joins nor splits them
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=min(share.workers, len(blocks))),
            **resources,
        )
        for _ in data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            polling.check()


@contextmanager
def _quiet() -> Iterator[None]:
    """Ray Data without its progress bars and reports; what it was set to comes back."""
    import ray.data

    context = ray.data.DataContext.get_current()
    quiet = {"enable_progress_bars": False, "print_on_execution_start": False}
    before = {name: getattr(context, name) for name in quiet}
    logger = logging.getLogger("ray.data")
    level = logger.level
    for name, value in quiet.items():
        setattr(context, name, value)
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            setattr(context, name, value)


class _Polling:
    """Fetches records from the ledger while batches are being done, in a thread; the rest at the end."""

    def __init__(self, ledger: Any, take: Callable[[Record], None], tick: Callable[[], None]):
        self.ledger, self.take, self.tick = ledger, take, tick
        self.error: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="manifest", daemon=True)

    def __enter__(self) -> _Polling:
        self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._stop.set()
        self._thread.join()
        if error is None:
            self.check()

    def check(self) -> None:
        """Raise what went wrong in the thread."""
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        import ray

        try:
            last = False
            while not last:
                last = self._stop.wait(POLL)
                for record in ray.get(self.ledger.fetch.remote()):
                    self.take(record)
                self.tick()
        except BaseException as error:  # raised where the job is waited for
            self.error = error
