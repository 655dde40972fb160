"""Grouped restoration by how alike degradations are (GRIDS, arXiv 2407.12273): ``mirage grids``.

How far degradations lie from each other (`fit_ggd`, `kl_divergence`, `similarity`, `similarity_matrix`), the fewest
groups of them that can share a network (`search_groups`), networks trained and measured for that (`TrainAndMeasure`) or
published (`CachedPerformance`), and photographs restored by the nearest group's network (`GroupedRestorer`).

Modules are imported when a name of theirs is first asked for: importing this package is light.
"""

from __future__ import annotations

from mirage.lazy import lazily

# What degradations are told apart by, and what is done with groups of them.
_PLACES: dict[str, str] = {
    # similarity
    "BlockDescriptor": "features",
    "Descriptor": "features",
    "GGD": "ggd",
    "SRResNetDescriptor": "descriptor",
    "Selection": "selection",
    "SimilarityMatrix": "matrix",
    "descriptor_ggd": "features",
    "fit_ggd": "ggd",
    "fit_values": "ggd",
    "kl_divergence": "ggd",
    "mean_ggd": "ggd",
    "query_ggd": "selection",
    "sample_patches": "patches",
    "select": "selection",
    "similarity": "ggd",
    "similarity_matrix": "matrix",
    # groups
    "DEGRADATIONS": "groups",
    "CachedPerformance": "performance",
    "Calibration": "calibration",
    "Choice": "restorer",
    "GroupSearch": "search",
    "GroupedOutcome": "grouped_files",
    "GroupedRestorer": "restorer",
    "Grouping": "search",
    "MeasureGroup": "training",
    "Performance": "performance",
    "RankedGroup": "groups",
    "Ranking": "groups",
    "Restored": "restorer",
    "RestorerGroup": "restorer",
    "Step": "search",
    "TrainAndMeasure": "trained",
    "TrainGroup": "training",
    "TrainingFailed": "trained",
    "Workers": "workers",
    "calibrate": "calibration",
    "delta_p": "groups",
    "enumerate_groupings": "groups",
    "group_name": "groups",
    "load_grouping": "search",
    "parse_group": "groups",
    "published": "performance",
    "rank_groups": "groups",
    "read_performance": "performance",
    "search_groups": "search",
    "write_performance": "performance",
}

__all__ = [
    # similarity
    "BlockDescriptor",
    "Descriptor",
    "GGD",
    "SRResNetDescriptor",
    "Selection",
    "SimilarityMatrix",
    "descriptor_ggd",
    "fit_ggd",
    "fit_values",
    "kl_divergence",
    "mean_ggd",
    "query_ggd",
    "sample_patches",
    "select",
    "similarity",
    "similarity_matrix",
    # groups
    "DEGRADATIONS",
    "CachedPerformance",
    "Calibration",
    "Choice",
    "GroupSearch",
    "GroupedOutcome",
    "GroupedRestorer",
    "Grouping",
    "MeasureGroup",
    "Performance",
    "RankedGroup",
    "Ranking",
    "Restored",
    "RestorerGroup",
    "Step",
    "TrainAndMeasure",
    "TrainGroup",
    "TrainingFailed",
    "Workers",
    "calibrate",
    "delta_p",
    "enumerate_groupings",
    "group_name",
    "load_grouping",
    "parse_group",
    "published",
    "rank_groups",
    "read_performance",
    "search_groups",
    "write_performance",
]


__getattr__, __dir__ = lazily(__name__, _PLACES)
