"""A tree of experts for clusters of degradations, and a router that knows how sure it is: ``mirage unirestorer``.

UniRestorer (arXiv 2412.20157): one network for each cluster of degradations, clusters at several granularities, and a
router that picks the cluster and how coarse it should be.

Modules are imported when a name of theirs is first asked for: importing this package is light.
"""

from __future__ import annotations

from mirage.lazy import lazily

_PLACES: dict[str, str] = {
    # low-rank experts
    "ExpertStore": "store",
    "LoRAConv": "lora",
    "LoRASettings": "lora",
    "add_lora": "lora",
    "fold": "lora",
    "load_lora": "lora_files",
    "lora_parameters": "lora",
    "lora_settings": "lora",
    "lora_state": "lora_files",
    "remove_lora": "lora",
    "save_lora": "lora_files",
    "unfold": "lora",
    # extractors
    "CLIPExtractor": "clip_tower",
    "Extractor": "extractors",
    "GridsExtractor": "grids_extractor",
    "ExtractorRun": "extractor_training",
    "LabelledImages": "retrieval",
    "Retrieval": "retrieval",
    "SmallExtractor": "small_extractor",
    "embed_all": "retrieval",
    "labelled_images": "retrieval",
    "load_extractor": "extractors",
    "measure_retrieval": "retrieval",
    "save_extractor": "extractors",
    "views": "extractors",
    # tree
    "embedding_map": "draw",
    "tree_figure": "draw",
    "write_figure": "draw",
    "ExpertTree": "tree",
    "Node": "tree",
    "RELEASED_CHILDREN": "tree",
    # router
    "ExpertModules": "dispatcher",
    "Experts": "dispatcher",
    "Router": "router",
    "RouterLoss": "losses",
    "RouterTerms": "losses",
    "Routes": "router",
    "balance_loss": "losses",
    "centre_loss": "losses",
    "cv_squared": "losses",
    "dispatch": "dispatcher",
    "StoredExperts": "dispatcher",
    "straight_through": "router",
    # system and training
    "ExpertTrainings": "expert_training",
    "Explanation": "system",
    "MemberSet": "samples",
    "RestoredImage": "system",
    "RoutedNetwork": "router_training",
    "RoutedOutcome": "routed_files",
    "RouterRun": "router_training",
    "RouterSettings": "router_training",
    "SystemFolder": "folder",
    "TrainExpert": "expert_training",
    "UniRestorer": "system",
    "collapsed_experts": "router_training",
    "embed_samples": "samples",
    "load_router": "router_training",
    "save_router": "router_training",
}

__all__ = [
    # low-rank experts
    "ExpertStore",
    "LoRAConv",
    "LoRASettings",
    "add_lora",
    "fold",
    "load_lora",
    "lora_parameters",
    "lora_settings",
    "lora_state",
    "remove_lora",
    "save_lora",
    "unfold",
    # extractors
    "CLIPExtractor",
    "Extractor",
    "GridsExtractor",
    "ExtractorRun",
    "LabelledImages",
    "Retrieval",
    "SmallExtractor",
    "embed_all",
    "labelled_images",
    "load_extractor",
    "measure_retrieval",
    "save_extractor",
    "views",
    # tree
    "RELEASED_CHILDREN",
    "ExpertTree",
    "Node",
    "embedding_map",
    "tree_figure",
    "write_figure",
    # router
    "ExpertModules",
    "Experts",
    "Router",
    "RouterLoss",
    "RouterTerms",
    "Routes",
    "balance_loss",
    "centre_loss",
    "cv_squared",
    "dispatch",
    "StoredExperts",
    "straight_through",
    # system and training
    "ExpertTrainings",
    "Explanation",
    "MemberSet",
    "RestoredImage",
    "RoutedNetwork",
    "RoutedOutcome",
    "RouterRun",
    "RouterSettings",
    "SystemFolder",
    "TrainExpert",
    "UniRestorer",
    "collapsed_experts",
    "embed_samples",
    "load_router",
    "save_router",
]


__getattr__, __dir__ = lazily(__name__, _PLACES)
