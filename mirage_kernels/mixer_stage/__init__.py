"""The first half of a MIRAGE block, ``x + attn(norm1(x))``, as one operator that keeps its input and little more."""

from mirage_kernels.mixer_stage.op import mixer_stage
from mirage_kernels.mixer_stage.reference import MixerOutput
from mirage_kernels.mixer_stage.reference import mixer_stage as reference
from mirage_kernels.mixer_stage.weights import MixerWeights

__all__ = ["MixerOutput", "MixerWeights", "mixer_stage", "reference"]
