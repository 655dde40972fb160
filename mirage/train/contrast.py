"""InfoNCE over all processes: each one's embeddings are contrasted with those of the whole batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["gather_embeddings"]


def gather_embeddings(z: Tensor, fabric: Any) -> Tensor:
    """The embeddings of all processes, in the order of their ranks: ``[B, D]`` to ``[world * B, D]``.

    A loss of the result has the same value on every process. Its gradient flows to this process's own embeddings, times
    the number of processes: `DistributedDataParallel` then averages the gradients of the weights to those that one
    process with the whole batch has. Nothing is communicated in the backward pass.

    Args:
        z: this process's embeddings; every process has as many.
        fabric: Lightning's.
    """
    world = fabric.world_size
    if world == 1:
        return z
    # Fabric's own all_gather calls a function that PyTorch warns of since 2.12.
    gathered = [torch.empty_like(z) for _ in range(world)]
    torch.distributed.all_gather(gathered, z.detach().contiguous())
    own = z + (world - 1) * (z - z.detach())  # the value of z exactly, its gradient times world
    parts = [own if rank == fabric.global_rank else gathered[rank] for rank in range(world)]
    return torch.cat(parts)
