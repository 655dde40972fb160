"""What each mode of ``mirage restore --attention`` gives: PSNR, time and memory.

    python -m benchmarks.attention_modes --weights denoise --clean ../shared/data/CBSD68 --sigma 25
    python -m benchmarks.attention_modes --size 6000x4000 --memory 2G

Each mode runs in a process of its own, whose own memory (RssAnon) is read every 20 ms. With ``--clean``, the PSNR is
the mean over images of the folder with Gaussian noise of ``--sigma`` / 255, from ``default_rng(0)``, image after image;
with ``--size``, the image is noise, which takes as long as any other. Without ``--weights`` MIRAGE-T's are random.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

MODES = ("whole", "tile", "local", "global")


class PeakAnonymous:
    """The most of its own memory that this process has while the block runs; `bytes` afterwards."""

    def __enter__(self) -> PeakAnonymous:
        from mirage.restore.budget import anonymous_memory

        self.bytes, self._ended, self._read = anonymous_memory(), threading.Event(), anonymous_memory
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            self.bytes = max(self.bytes, self._read())

    def __exit__(self, *error) -> None:
        self._ended.set()
        self._thread.join()


def measure(options: argparse.Namespace) -> dict[str, float | str | None]:
    """One mode, in this process."""
    import numpy as np
    import torch

    import mirage

    torch.manual_seed(0)
    weights = options.weights or mirage.mirage_tiny()
    memory = {"memory": options.memory} if options.memory else {}
    tile = {"tile": options.tile} if options.tile and options.mode == "tile" else {}
    restorer = mirage.Restorer(weights, attention=options.mode, device="cpu", **memory, **tile)
    generator = np.random.default_rng(0)
    errors, seconds, pixels = [], 0.0, 0
    with PeakAnonymous() as peak:
        for image, target in _images(options, generator):
            begin = time.perf_counter()
            restored = restorer(image)
            seconds, pixels = seconds + time.perf_counter() - begin, pixels + image.shape[0] * image.shape[1]
            if target is not None:
                difference = restored.astype(np.float64) - target / 255.0
                errors.append(-10 * np.log10(np.mean(difference**2)))
    return {
        "mode": options.mode,
        "psnr": float(np.mean(errors)) if errors else None,
        "microseconds_per_pixel": seconds / pixels * 1e6,
        "peak_anonymous_mib": peak.bytes / 2**20,
    }


def _images(options: argparse.Namespace, generator):
    import numpy as np

    if options.clean is None:
        width, height = map(int, options.size.split("x"))
        yield generator.integers(0, 256, (height, width, 3), dtype=np.uint8), None
        return
    from mirage.images import read_image
    from mirage.train.data.pictures import files_in

    for path in files_in(options.clean)[: options.limit]:
        target = read_image(path).pixels
        noise = generator.standard_normal(target.shape) * (options.sigma / 255)
        yield np.clip(target / 255.0 + noise, 0, 1).astype(np.float32), target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", help="a checkpoint, or the name of packaged weights; random without")
    parser.add_argument("--clean", type=Path, help="folder of clean images")
    parser.add_argument("--sigma", type=float, default=25.0, help="of the noise, in units of 8 bits")
    parser.add_argument("--limit", type=int, help="only so many images")
    parser.add_argument("--size", default="768x512", help="WIDTHxHEIGHT of the image without --clean")
    parser.add_argument("--memory", help="budget, such as 2G")
    parser.add_argument("--tile", type=int, help="side of tiles")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--mode", help=argparse.SUPPRESS)  # what a process of its own measures
    options = parser.parse_args()
    if options.mode:
        print(json.dumps(measure(options)))
        return
    print(f"{'mode':8} {'PSNR dB':>8} {'us/pixel':>9} {'RssAnon MiB':>12}")
    for mode in options.modes.split(","):
        command = [sys.executable, "-m", "benchmarks.attention_modes", *sys.argv[1:], "--mode", mode]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{mode:8} {done.stderr.strip().splitlines()[-1]}")
            continue
        row = json.loads(done.stdout.splitlines()[-1])
        psnr = "-" if row["psnr"] is None else f"{row['psnr']:.2f}"
        print(f"{mode:8} {psnr:>8} {row['microseconds_per_pixel']:9.2f} {row['peak_anonymous_mib']:12.0f}", flush=True)


if __name__ == "__main__":
    main()
