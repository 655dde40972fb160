"""What measuring one degradation takes: ``python -m benchmarks.grids_similarity``, from a share of its patches.

Processor time (user and system, all threads), which other work on the machine changes less than it does elapsed time.
The descriptor's is that of ``--patches``, in the blocks that all 800 would be cut into, times 800 by their number;
the Gram matrix's is that of all 800 patches with a share of their features, times the share.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from typing import Any

import click
import torch

from mirage.grids.descriptor import SRResNetDescriptor
from mirage.grids.features import MEMORY
from mirage.grids.ggd import COMPONENTS, fit_values
from mirage.grids.pca import centred_gram, gram_scores
from mirage.networks import create

ALL, FEATURES, KINDS, SHARE = 800, 1_048_576, 11, 32
MACS = {"descriptor": 2.57e9 * ALL, "Gram matrix": ALL * (ALL + 1) / 2 * FEATURES}


def spent(work: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds of a call, and what it returned."""
    before = time.process_time()
    result = work()
    return time.process_time() - before, result


@click.command()
@click.option("--patches", default=64, show_default=True, type=click.IntRange(min=16, max=ALL))
@click.option("--threads", default=2, show_default=True, type=click.IntRange(min=1))
@torch.no_grad()
def main(patches: int, threads: int) -> None:
    """Print processor seconds of each part of one degradation, of the whole, and the peak of memory here."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    descriptor = SRResNetDescriptor(create("srresnet"))
    images = torch.rand(patches, 3, 32, 32)
    descriptor.features(images[:2])  # what first calls set up
    blocks, _ = spent(lambda: sum(1 for _ in descriptor.feature_blocks(images, MEMORY * patches // ALL)))
    features = torch.randn(ALL, FEATURES // SHARE)
    centred_gram([features[:, :64]])
    gram, matrix = spent(lambda: centred_gram([features]))
    fit, _ = spent(lambda: fit_values(gram_scores(matrix, COMPONENTS)))
    seconds = {"descriptor": blocks * ALL / patches, "Gram matrix": gram * SHARE, "decomposition and fit": fit}
    for name, value in seconds.items():
        macs = f", {MACS[name] / 1e12:.2f} TMAC" if name in MACS else ""
        print(f"{name}: {value:.1f} s{macs}")
    total = sum(seconds.values())
    print(f"one degradation: {total:.0f} s; {KINDS}: {KINDS * total / 60:.1f} min of processor time")
    print(f"peak of memory here: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
