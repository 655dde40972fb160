"""`Restorer`: a network and how to run it on images of any size."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from torch import nn

from mirage.restore.budget import Size, parse_bytes
from mirage.restore.loading import check_network, load_model, parse_dtype, prepare_module, resolve_device
from mirage.restore.modes import ATTENTION, Settings, check_image, restore_image
from mirage.restore.pixels import as_image, where_of
from mirage.restore.tiles import resolve_overlap

if TYPE_CHECKING:
    from mirage.images import ImageHeader
    from mirage.restore.files import Job, Outcome

__all__ = ["ATTENTION", "Restorer"]


class Restorer:
    """Restores images with one network.

    Args:
        weights: a checkpoint file, of MIRAGE or of a network of `mirage.networks`; the name of weights that come with
            the package (``"denoise"``); or a module, which is left as it is: what runs is an accelerated copy in
            evaluation mode that shares its weights. (A module in which `mirage.fast` recognises nothing runs itself, in
            evaluation mode.)
        device: ``"auto"`` (the GPU where there is one; a module's own), ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ...
        memory: bytes that this process's own memory may come to, such as ``"2G"`` or ``1 << 31``; on a GPU, of its
            memory. None: what is there.
        tile: side of tiles in pixels, a multiple of 8, at most (all are equal, and as few as possible). None: from
            the memory. Where it is given, ``"auto"`` means ``"tile"``.
        overlap: the least that neighbouring tiles share, in pixels. None: 32, or half of a smaller tile.
        attention: ``"auto"``: one pass where memory is enough for it, else ``"global"``, which is equal to it;
            ``"whole"``: one pass, or an error; ``"tile"``: each tile by itself, blended; ``"local"``: with the
            statistics of windows of about the size that the network was trained on; ``"global"``: in strips, with the
            statistics of the whole image, feature maps in files without a name. See docs/restore.md.
        window: of ``"local"``: side of its windows in pixels, a multiple of 8.
        scratch: of ``"local"`` and ``"global"``: folder for feature maps. None: the system's for temporary files.
        dtype: what the network computes in: ``"fp32"``, ``"bf16"``, ``"fp16"`` or torch's dtypes. None: float32; a
            module's own.
        fast: the fast modules, or plain PyTorch.
        key: which network of a checkpoint, where it holds several.

    Raises:
        ValueError, TypeError, OSError: an argument is wrong, or the weights cannot be read.

    Calls from several threads at once are safe, and give what they give one after the other.
    """

    def __init__(
        self,
        weights: str | os.PathLike[str] | nn.Module,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype | None = None,
        memory: int | str | None = None,
        tile: int | None = None,
        overlap: int | None = None,
        attention: str = "auto",
        window: int = 192,
        scratch: str | os.PathLike[str] | None = None,
        fast: bool = True,
        key: str | None = None,
    ) -> None:
        if attention not in ATTENTION:
            raise ValueError(f"attention: expected one of {', '.join(ATTENTION)}, got {attention!r}")
        if tile is not None and attention not in ("auto", "tile"):
            raise ValueError(f"tile: goes with attention tile, got attention={attention!r}")
        if attention in ("local", "global") and not fast:
            raise ValueError(f"attention: {attention} needs the fast modules (fast=True; no --reference)")
        if scratch is not None and not Path(scratch).is_dir():
            raise ValueError(f"scratch: expected a folder that is there, got {os.fspath(scratch)!r}")
        overlap = resolve_overlap(tile, overlap)
        if not isinstance(window, int) or window <= 0 or window % 8:
            raise ValueError(f"window: expected a positive multiple of 8, got {window!r}")
        self.settings = Settings(
            attention=attention if tile is None else "tile",
            memory=None if memory is None else parse_bytes(memory),
            tile=tile,
            overlap=overlap,
            window=window,
            scratch=scratch,
        )
        chosen = parse_dtype(dtype)
        if isinstance(weights, nn.Module):
            where = None if device == "auto" else resolve_device(device)
            self.model = prepare_module(weights, fast=fast, device=where, dtype=chosen)
        else:
            self.model = load_model(Path(weights), fast=fast, device=resolve_device(device), key=key).to(chosen)
        check_network(self.model, attention)

    def __repr__(self) -> str:
        device, dtype = where_of(self.model)
        return f"Restorer({type(self.model).__name__}, device={str(device)!r}, dtype={dtype}, {self.settings})"

    @overload
    def __call__(self, array: np.ndarray) -> np.ndarray: ...
    @overload
    def __call__(self, array: list[np.ndarray]) -> list[np.ndarray]: ...
    def __call__(self, array):
        """Restore an image, or each of a list of images.

        Args:
            array: ``[H, W]`` or ``[H, W, C]``; uint8, uint16, or float32 in [0, 1]. C is 1 (grey), 2 (with alpha), 3 or
                4 (with alpha).

        Returns:
            The same shape and type; alpha, and colours where it is 0, are the input's.

        Raises:
            TypeError, ValueError: ``array`` is of another type or shape, or holds NaN; the model returned such.
            NotEnoughMemory: (a ValueError) the image needs more memory than there is.
        """
        if isinstance(array, (list, tuple)):
            return [self(one) for one in array]
        pixels = as_image(array)
        self._check(Size(pixels.shape[1], pixels.shape[0], pixels.shape[2], pixels.dtype.itemsize * 8))
        return self._restore(pixels).reshape(array.shape)

    def files(
        self,
        inputs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        out_dir: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        check_memory: bool = True,
        on_skip: Callable[[Path, str], None] | None = None,
        **options: Any,
    ) -> Iterator[Outcome]:
        """Restore files, and all images of folders, into a folder. Needs the extra ``images``.

        A target appears under its name only when it is complete. One that is there and not older than its source is
        finished and left alone, so a run that was stopped goes on where it was. (It is not known which weights made
        it: use another folder, or ``overwrite``, after changing them.)

        Args:
            inputs: files and folders.
            out_dir: where results go, under the names of their inputs.
            overwrite: restore again what is finished.
            check_memory: refuse an image that takes more memory than is available, before it takes it.
            on_skip: called with each file of a folder that looks like a picture and is not restored, and why.
            options: ``format``, ``quality``, ``max_pixels``, as of `mirage.restore.files.FileOptions`.

        Yields:
            An `Outcome` for each file as it is done; its ``error`` says what failed, and the others are still done.
        """
        from mirage.restore.files import collect_jobs

        given = [inputs] if isinstance(inputs, (str, os.PathLike)) else inputs
        jobs = collect_jobs(map(Path, given), Path(out_dir), options.get("format", "same"), on_skip)
        return self.run(jobs, overwrite=overwrite, check_memory=check_memory, **options)

    def run(
        self, jobs: Iterable[Job], *, overwrite: bool = False, check_memory: bool = True, **options: Any
    ) -> Iterator[Outcome]:
        """What `files` does, of jobs that `mirage.restore.collect_jobs` has listed."""
        from mirage.restore.files import FileOptions, restore_each

        check = self._check if check_memory else None
        return restore_each(jobs, self._restore, FileOptions(overwrite=overwrite, **options), check)

    def _check(self, header: ImageHeader | Size) -> None:
        check_image(self.model, header, self.settings)

    def _restore(self, pixels: np.ndarray, note: Callable[[str], None] = lambda _: None) -> np.ndarray:
        return restore_image(self.model, pixels, self.settings, note)
