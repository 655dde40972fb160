"""The stages of a block on parts of a feature map: for maps that are not in memory as a whole, and for statistics of a
part of the map instead of the whole.

What a block needs of the whole map are small sums; the rest is local. So a stage on a map that lies on a disk is

    sums = sum(mixer_stage_sums(strip, ...) for every strip of x)
    statistics = mixer_stage_statistics(sums, pixels, weights)
    y = feed_forward_stage_region(mixer_stage_apply(strip, weights, statistics, ...), ...)  for every strip

with a halo of 1, 3 and 1 rows of the neighbouring strips.
"""

from mirage_kernels.regions.op import (
    RegionStatistics,
    Window,
    feed_forward_stage_region,
    mixer_stage_apply,
    mixer_stage_statistics,
    mixer_stage_sums,
)

__all__ = [
    "RegionStatistics",
    "Window",
    "feed_forward_stage_region",
    "mixer_stage_apply",
    "mixer_stage_statistics",
    "mixer_stage_sums",
]
