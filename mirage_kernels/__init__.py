"""Operators of the MIRAGE image-restoration network: one public function each, over Triton, C++ and PyTorch kernels.

The implementation is chosen per call by the tensor's device: Triton on GPUs, C++ on CPUs, PyTorch otherwise. See
:func:`use`, :func:`available` and :func:`last_used`.
"""

from mirage_kernels._runtime.dispatch import IMPLEMENTATIONS, available, last_used, use, why_not
from mirage_kernels.channel_attention import channel_attention
from mirage_kernels.channel_attention_fusion import channel_attention_fusion
from mirage_kernels.channel_attention_stage import ChannelAttentionWeights, channel_attention_stage
from mirage_kernels.channel_layer_norm import channel_layer_norm
from mirage_kernels.dense_conv2d import dense_conv2d
from mirage_kernels.dynamic_depthwise_conv2d import dynamic_depthwise_conv2d
from mirage_kernels.feed_forward_stage import FeedForwardWeights, feed_forward_stage
from mirage_kernels.feed_forward_stages import ScaledFeedForward, feed_forward_stages
from mirage_kernels.gated_depthwise_ffn import gated_depthwise_ffn
from mirage_kernels.mixer_stage import MixerOutput, MixerWeights, mixer_stage
from mirage_kernels.spd_covariance import spd_covariance
from mirage_kernels.transformer_blocks import BlockWeights, PackedBlocks, transformer_blocks
from mirage_kernels.tri_branch_fusion import tri_branch_fusion
from mirage_kernels.workspace import limit_workspace, release_workspace

__version__ = "0.1.0"

__all__ = [
    "IMPLEMENTATIONS",
    "BlockWeights",
    "ChannelAttentionWeights",
    "FeedForwardWeights",
    "MixerOutput",
    "MixerWeights",
    "PackedBlocks",
    "ScaledFeedForward",
    "available",
    "channel_attention",
    "channel_attention_fusion",
    "channel_attention_stage",
    "channel_layer_norm",
    "dense_conv2d",
    "dynamic_depthwise_conv2d",
    "feed_forward_stage",
    "feed_forward_stages",
    "gated_depthwise_ffn",
    "last_used",
    "limit_workspace",
    "mixer_stage",
    "release_workspace",
    "spd_covariance",
    "transformer_blocks",
    "tri_branch_fusion",
    "use",
    "why_not",
]
