"""The network as a list of steps that work on strips, with the weights that `mirage.fast` has recognised."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from mirage import fast
from mirage.fast.block import TransformerBlock
from mirage.fast.recognise.parts import is_dense_convolution
from mirage.fast.recognise.pattern import bypass_problem
from mirage.model import MIRAGE
from mirage_kernels import BlockWeights, PackedBlocks

__all__ = ["Block", "Conv", "Down", "Join", "Keep", "Output", "Step", "Up", "steps_of"]


@dataclass(frozen=True)
class Conv:
    """A convolution without bias of the size of its weight, 3x3 or 1x1."""

    weight: Tensor


@dataclass(frozen=True)
class Block:
    """A whole block, which needs sums over the map that comes in."""

    weights: BlockWeights


@dataclass(frozen=True)
class Keep:
    """What comes in is needed again at the :class:`Join` of the same name."""

    name: str


@dataclass(frozen=True)
class Join:
    """Kept channels are put behind those that come in."""

    name: str


@dataclass(frozen=True)
class Down:
    """A 3x3 convolution and a pixel unshuffle by 2."""

    weight: Tensor


@dataclass(frozen=True)
class Up:
    """A 3x3 convolution and a pixel shuffle by 2."""

    weight: Tensor


@dataclass(frozen=True)
class Output:
    """The last 3x3 convolution, to whose result the image is added."""

    weight: Tensor


Step = Conv | Block | Keep | Join | Down | Up | Output


def steps_of(model: nn.Module) -> list[Step]:
    """The steps of a network, in order.

    Raises:
        TypeError: `model` is not a `mirage.MIRAGE`, or one with another forward.
        ValueError: naming the module that is not what it is taken for: a block that `mirage.fast.accelerate` has not
            replaced or that calls its modules one by one, a convolution with a bias, hooks, training mode.
    """
    _check_network(model)
    assert isinstance(model, MIRAGE)
    network = _Network(model)
    return [
        Conv(network.conv("patch_embed", "proj", size=3)),
        *network.blocks("encoder_level1"),
        Keep("1"),
        Down(network.resampling("down1_2", nn.PixelUnshuffle)),
        *network.blocks("encoder_level2"),
        Keep("2"),
        Down(network.resampling("down2_3", nn.PixelUnshuffle)),
        *network.blocks("encoder_level3"),
        Keep("3"),
        Down(network.resampling("down3_4", nn.PixelUnshuffle)),
        *network.blocks("latent"),
        Conv(network.conv("reduce_dim_level3", size=1)),
        Up(network.resampling("up4_3", nn.PixelShuffle)),
        Join("3"),
        Conv(network.conv("reduce_chan_level3", size=1)),
        *network.blocks("decoder_level3"),
        Up(network.resampling("up3_2", nn.PixelShuffle)),
        Join("2"),
        Conv(network.conv("reduce_chan_level2", size=1)),
        *network.blocks("decoder_level2"),
        Up(network.resampling("up2_1", nn.PixelShuffle)),
        Join("1"),
        *network.blocks("decoder_level1"),
        *network.blocks("refinement"),
        Output(network.conv("output", size=3)),
    ]


def _check_network(model: nn.Module) -> None:
    if not isinstance(model, MIRAGE):
        raise TypeError(f"model: expected a mirage.MIRAGE, got {type(model).__name__}")
    if type(model).forward not in (MIRAGE.forward, fast.MIRAGE.forward):
        raise TypeError(f"model: expected the forward of mirage.MIRAGE, {type(model).__name__} has its own")
    problem = bypass_problem(model)
    if problem:
        raise ValueError(f"model: {problem}")


class _Network:
    """Weights by the names of modules, each asked whether it is what a step takes it for."""

    def __init__(self, model: MIRAGE) -> None:
        self.model = model

    def conv(self, *names: str, size: int) -> Tensor:
        modules = list(self._bypassed(*names))
        conv = modules[-1]
        if not isinstance(conv, nn.Conv2d) or not is_dense_convolution(conv) or conv.kernel_size != (size, size):
            raise ValueError(f"{'.'.join(names)}: expected a {size}x{size} convolution without bias, got {conv}")
        return conv.weight

    def resampling(self, name: str, shuffle: type[nn.Module]) -> Tensor:
        weight = self.conv(name, "body", "0", size=3)
        body = getattr(self.model, name).body
        factor = getattr(body[-1], "upscale_factor", None) or getattr(body[-1], "downscale_factor", None)
        if len(body) != 2 or not isinstance(body[1], shuffle) or factor != 2:
            raise ValueError(f"{name}.body: expected a convolution and a {shuffle.__name__}(2), got {body}")
        return weight

    def blocks(self, name: str) -> list[Block]:
        *_, level = self._bypassed(name)
        found = []
        for i, block in enumerate(level.children()):
            if not isinstance(block, TransformerBlock):
                raise ValueError(
                    f"{name}.{i}: expected a block of mirage.fast, got {type(block).__name__}; "
                    "mirage.fast.accelerate(model) replaces blocks, mirage.fast.summary(model) says why not"
                )
            count, weights, numbers = type(block).matcher.match_run([block], 0)
            if not count:
                reasons = [reason for stage in block.stages if (reason := _problem(stage, block))]
                raise ValueError(f"{name}.{i}: {'; '.join(reasons) or bypass_problem(block) or 'is not bypassable'}")
            found += [Block(weights) for weights in PackedBlocks(weights, numbers)]
        return found

    def _bypassed(self, *names: str) -> Iterator[nn.Module]:
        """The modules along a path, each of which is passed by."""
        module: nn.Module = self.model
        for i, name in enumerate(names):
            module = getattr(module, name)
            problem = bypass_problem(module)
            if problem:
                raise ValueError(f"{'.'.join(names[: i + 1])}: {problem}")
            yield module


def _problem(stage: object, block: nn.Module) -> str:
    return stage.pattern.contents_problem(block, [], inference=True)  # type: ignore[attr-defined]
