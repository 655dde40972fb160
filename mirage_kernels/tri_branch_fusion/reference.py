"""``tri_branch_fusion`` in plain PyTorch: the definition, and what runs where no kernel does."""

import torch
from torch import Tensor


def tri_branch_fusion(
    att: Tensor, conv: Tensor, mlp: Tensor, l_att: Tensor, l_conv: Tensor, l_mlp: Tensor
) -> Tensor:
    return torch.cat(
        (
            att + l_att * torch.sigmoid(conv + mlp),
            conv + l_conv * torch.sigmoid(att + mlp),
            mlp + l_mlp * torch.sigmoid(att + conv),
        ),
        dim=1,
    )
