"""What training sees: sets of pictures (`sets`), read from files and shards (`pictures`), as samples (`samples`)."""

from mirage.train.data.samples import Sample, TrainingSet, ValidationSet, augment, batches
from mirage.train.data.sets import Pair, find_pairs

__all__ = ["Pair", "Sample", "TrainingSet", "ValidationSet", "augment", "batches", "find_pairs"]
