"""A job: list, restore on a cluster of Ray, keep the manifest."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mirage.distributed.cluster import connected, restore_batches, share_out
from mirage.distributed.manifest import FAILED, PRESENT, RESTORED, History, ManifestWriter, Record, new_run
from mirage.distributed.places import Place
from mirage.distributed.plan import Planner, as_block, batches
from mirage.distributed.worker import WorkerOptions
from mirage.extras import not_there

__all__ = ["Summary", "restore"]

MANIFEST = "manifest.parquet"
WHERE = ("device", "memory", "fast", "scratch")  # arguments of `Restorer` that leave results as they are, to rounding
BATCH_BYTES = 64 << 20  # of the files in a batch: large ones come in smaller numbers, for the last batches' sake


@dataclass(frozen=True)
class Summary:
    """What a job did.

    Attributes:
        listed: inputs found.
        restored, failed: in this run.
        present: whose output was there before any run with this manifest.
        finished_before, failed_before: left alone, as an earlier run had restored them or failed to.
        skipped, skipped_examples: files in folders that are no images.
        seconds: all in all.
        manifest: its URL.
    """

    listed: int
    restored: int
    failed: int
    present: int
    finished_before: int
    failed_before: int
    skipped: int
    skipped_examples: tuple[str, ...]
    seconds: float
    manifest: str


def restore(
    inputs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    weights: Any,
    *,
    key: str | None = None,
    restorer: Mapping[str, Any] | None = None,
    format: str = "same",
    quality: int = 95,
    max_pixels: int | None = None,
    manifest: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    retry_failed: bool = False,
    address: str | None = None,
    workers: int | None = None,
    cpus: int | None = None,
    batch: int = 32,
    retries: int = 3,
    storage_options: Mapping[str, Mapping[str, Any]] | None = None,
    on_listed: Callable[[int, int], None] | None = None,
    on_done: Callable[[Record], None] | None = None,
) -> Summary:
    """Restore many image files on the machines of a Ray cluster, or on this one.

    Args:
        inputs: folders, files and patterns, local or as URLs of fsspec (``s3://bucket/in``, ``gs://...``). Files keep
            their places below a folder, or below the fixed part of a pattern.
        out: folder of the results, likewise. All machines must reach both.
        weights: a checkpoint, the name of packaged weights, or a network; read here, and sent to the workers.
        key: which network of a checkpoint with several.
        restorer: further arguments of `mirage.Restorer`: ``attention``, ``memory``, ``tile``, ``dtype``, ...
        format, quality, max_pixels: of the results, and the limit of inputs, as for ``mirage restore``.
        manifest: its folder.  By default ``manifest.parquet`` in ``out``.
        overwrite: restore everything again. Without it, inputs that the manifest says are restored are left alone
            unless their size or version has changed, and so are inputs whose output is there already.
        retry_failed: try those again that failed in an earlier run.
        address: of the cluster, such as ``"auto"``; by default that of ``RAY_ADDRESS``, else this machine alone. A
            connection that exists is used, and left open.
        workers: how many. By default one a GPU; without GPUs one for each four CPUs of a machine.
        cpus: for each worker; by default as many as there are for the number of workers.
        batch: files that a worker gets at once, at most.
        retries: of reading and of writing a file, after errors that may pass.
        storage_options: arguments of file systems by protocol: ``{"s3": {"endpoint_url": ...}}``.
        on_listed: called with the numbers of inputs and of those left to do, once they are known.
        on_done: called with each `Record`, one at a time, in this thread or another.

    Raises:
        ImportError: an optional library is missing; the message says what to install.
        FileNotFoundError: an input is not there.
        ValueError: an argument cannot be; or the manifest has results of other settings, and ``overwrite`` is not set.
    """
    _require()
    start = time.monotonic()
    given = [inputs] if isinstance(inputs, (str, os.PathLike)) else list(inputs)
    places = tuple(Place(os.fspath(one), storage_options or {}) for one in given)
    target = Place(os.fspath(out), storage_options or {})
    records = Place(os.fspath(manifest or f"{os.fspath(out).rstrip('/')}/{MANIFEST}"), storage_options or {})
    _check(places, target, records, format, quality, batch, retries)
    chosen = {name: value for name, value in (restorer or {}).items() if value is not None}
    network = _network(weights, key, chosen.get("attention", "auto"))
    settings = _settings(network, chosen, format, quality)
    history = History(records, settings)
    if history.with_other_settings and not overwrite:
        raise ValueError(_describe_differences(records, history))
    options = WorkerOptions(places, target, new_run(), chosen, format, quality, max_pixels, retries)
    book = _Book(ManifestWriter(records, options.run, settings), on_done)
    planner = Planner(places, target, format, overwrite, retry_failed, history, book.take)
    try:
        blocks, left = [], 0
        for group in batches(planner.tasks(), batch, BATCH_BYTES):
            blocks.append(as_block(group, left))
            left += len(group)
        if on_listed is not None:
            on_listed(planner.listed, left)
        if blocks:
            use_gpus = not str(chosen.get("device", "auto")).startswith("cpu")
            with connected(address):
                restore_batches(
                    blocks,
                    network,
                    options,
                    lambda machines: share_out(machines, workers, cpus, use_gpus),
                    book.take,
                    book.writer.tick,
                )
    finally:
        book.writer.flush()
    return _summary(planner, book, time.monotonic() - start)


@dataclass
class _Book:
    """Counts records, and passes them on."""

    writer: ManifestWriter
    on_done: Callable[[Record], None] | None

    def __post_init__(self) -> None:
        self.counts = dict.fromkeys((RESTORED, FAILED, PRESENT), 0)

    def take(self, record: Record) -> None:
        self.counts[record.status] += 1
        self.writer.add(record)
        if self.on_done is not None:
            self.on_done(record)


def _summary(planner: Planner, book: _Book, seconds: float) -> Summary:
    counts, place = book.counts, book.writer.place
    summary = Summary(
        listed=planner.listed,
        restored=counts[RESTORED],
        failed=counts[FAILED],
        present=counts[PRESENT],
        finished_before=planner.finished,
        failed_before=planner.failed_before,
        skipped=planner.skipped_count,
        skipped_examples=tuple(planner.skipped),
        seconds=seconds,
        manifest=place.name(place.root),
    )
    missing = summary.listed - sum(counts.values()) - summary.finished_before - summary.failed_before
    if missing:
        raise RuntimeError(
            f"{missing} of {summary.listed} inputs have no record; run the job again, it goes on from here"
        )
    return summary


def _require() -> None:
    missing = not_there("ray", "ray", "pyarrow", "fsspec", "imagecodecs")
    if missing is not None:
        raise ImportError(missing)


def _check(
    places: tuple[Place, ...], out: Place, records: Place, format: str, quality: int, batch: int, retries: int
) -> None:
    from mirage.images import FORMATS

    if not places:
        raise ValueError("inputs: expected one or more, got none")
    for place in (*places, out, records):
        if "memory" in place.protocols:
            raise ValueError(
                f"{place.url}: memory:// is another one in each process, so workers would not find the files"
            )
    if format != "same" and format not in FORMATS:
        raise ValueError(f"format: expected same, {', '.join(FORMATS)}, got {format!r}")
    if not 1 <= quality <= 100:
        raise ValueError(f"quality: expected 1 to 100, got {quality}")
    for name, value, least in (("batch", batch, 1), ("retries", retries, 0)):
        if value < least:
            raise ValueError(f"{name}: expected {least} or more, got {value}")


def _network(weights: Any, key: str | None, attention: str) -> Any:
    """The network on the CPU, as it is read; workers make it fast, each on its own device."""
    from torch import nn

    from mirage.restore.loading import check_network, load_model

    network = weights if isinstance(weights, nn.Module) else load_model(weights, fast=False, device="cpu", key=key)
    check_network(network, attention)
    return network


def _settings(network: Any, chosen: Mapping[str, Any], format: str, quality: int) -> dict[str, Any]:
    """What decides the results' pixels and bytes, but for the inputs."""
    how = {name: str(value) for name, value in sorted(chosen.items()) if name not in WHERE}
    return {"weights": _fingerprint(network), "format": format, "quality": quality, **how}


def _fingerprint(network: Any) -> str:
    """The first 16 digits of a hash of the weights."""
    whole = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        whole.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        whole.update(tensor.detach().cpu().contiguous().flatten().view(-1).numpy().tobytes())
    return whole.hexdigest()[:16]


def _describe_differences(records: Place, history: History) -> str:
    values = [f"{name} {then} there, {now} here" for name, (then, now) in sorted(history.differences.items())]
    return (
        f"manifest: {records.url} has {history.with_other_settings} results of other settings ({'; '.join(values)}); "
        "overwrite (--overwrite) restores them again, another output folder or manifest keeps them"
    )
