"""Covariance of the channels over all positions, plus a multiple of the identity: the SPD head's features."""

from mirage_kernels.spd_covariance.op import spd_covariance
from mirage_kernels.spd_covariance.reference import spd_covariance as reference

__all__ = ["reference", "spd_covariance"]
