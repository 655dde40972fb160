"""The fusion of MIRAGE's three branches: each modulated by the other two, concatenated."""

from mirage_kernels.tri_branch_fusion.op import tri_branch_fusion
from mirage_kernels.tri_branch_fusion.reference import tri_branch_fusion as reference

__all__ = ["reference", "tri_branch_fusion"]
