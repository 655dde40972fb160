"""``spd_covariance`` in plain PyTorch: the definition, and what runs where no kernel does."""

import torch
from torch import Tensor


def spd_covariance(x: Tensor, eps: float = 1e-5) -> Tensor:
    x = x.flatten(2)
    centred = x - x.mean(2, keepdim=True)
    covariance = torch.bmm(centred, centred.transpose(1, 2)) / (x.shape[2] - 1)
    return covariance + eps * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
