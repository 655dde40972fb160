"""`accelerate` and `revert`: the modules of one model instance change class in place, and change back.

A module keeps its identity: the same object with the same parameters, buffers, hooks and flags, so optimizers,
averaged copies and references held elsewhere stay valid. Only the instance's class changes, and with it `forward`.
"""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import TypeVar

from torch import nn

from mirage.fast.recognise.kinds import KINDS, Kind, candidates, problem
from mirage.fast.recognise.pattern import ORIGINAL_CLASS

_MEMORY = "_mirage_memory"
MEMORY_MODES = ("low", "fast")
_REPLACEMENTS = tuple(kind.replacement for kind in KINDS)
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Summary:
    """What `accelerate` did to a model. `str()` gives a table.

    Attributes:
        replaced: path of each module that runs fast, with the name of its fast class.
        kept: path of each module that looks like one of those but was left alone, with the reason.
        others: class names of the remaining modules without children, with their number; these run as they are.
        called: path of each fast block that calls its modules one by one, where an operator would run in their place,
            with the reason: a hook, a parametrization, a module that was replaced or set up otherwise. Every forward
            asks again.
    """

    replaced: dict[str, str]
    kept: dict[str, str]
    others: dict[str, int]
    called: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        counts = Counter(self.replaced.values())
        lines = [f"{len(self.replaced)} modules run on mirage_kernels:"]
        lines += [f"  {count:4d}  {name}" for name, count in sorted(counts.items())]
        for title, reasons in (
            ("modules were left as they are", self.kept),
            ("blocks call some of their modules one by one", self.called),
        ):
            if reasons:
                lines.append(f"{len(reasons)} {title}:")
                lines += [f"  {path or '(the model itself)'}: {reason}" for path, reason in reasons.items()]
        if self.others:
            names = ", ".join(f"{count} {name}" for name, count in sorted(self.others.items()))
            lines.append(f"without a fast counterpart, and run by PyTorch: {names}")
        return "\n".join(lines)


def accelerate(model: Model, memory: str = "low") -> Model:
    """Swap the modules of `model` for fast ones, in place, and return it.

    Blocks, layer norms, gated CNN branches, mixers, attentions, feed-forward networks, the SPD covariance, MoCE-IR's
    experts and the convolutions outside all of these (1x1, bias-free 3x3, 3x3 between an image and features,
    depthwise, 2x2 of stride 2) are recognised by their structure (attributes and shapes), so a model of the authors'
    released code is accelerated as well as `mirage.mirage_tiny()`; a module of an unknown class must in addition agree
    with its fast counterpart on a random input. Parameters, buffers, `state_dict`, hooks, dtype, device and training
    mode stay as they are; other instances of the same classes are untouched. Calling it again does nothing more than to
    set `memory`.

    Args:
        model: a module that contains such modules, or is one.
        memory: what blocks keep from forward to backward. ``"low"``: their input, the tensor between mixer and
            feed-forward network, and small statistics; the rest is recomputed. ``"fast"``: also the hidden tensor of
            the feed-forward network (four to five times the input) in blocks of 96 channels or more, where computing
            it again takes longer than writing and reading it. Results are the same.

    Returns:
        `model` itself.

    Raises:
        TypeError: `model` is not a module. A model in which nothing is recognised is returned with a warning.
        ValueError: `memory` is neither of the two.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if memory not in MEMORY_MODES:
        raise ValueError(f"memory: expected one of {', '.join(MEMORY_MODES)}, got {memory!r}")
    chosen = [(module, kind) for _, module, kind in candidates(model) if kind is not None and _can_be(module, kind)]
    if all(kind.common for _, kind in chosen):
        warnings.warn(
            f"accelerate: nothing in {type(model).__name__} was recognised; mirage.fast.summary(model) says why",
            stacklevel=2,
        )
        return model
    for module, kind in chosen:
        if not isinstance(module, kind.replacement):
            vars(module)[ORIGINAL_CLASS] = type(module)
            module.__class__ = kind.replacement
        if hasattr(kind.replacement, _MEMORY):
            vars(module)[_MEMORY] = memory
    return model


def _can_be(module: nn.Module, kind: Kind) -> bool:
    return isinstance(module, kind.replacement) or not problem(module, kind)


def revert(model: Model) -> Model:
    """Undo `accelerate` in place, and return `model`: every module is of its former class again.

    Modules that were built fast (`mirage.fast.FeedForward(...)`) stay as they are.
    """
    for module in model.modules():
        vars(module).pop(_MEMORY, None)
        original = vars(module).pop(ORIGINAL_CLASS, None)
        if original is not None:
            module.__class__ = original
    return model


def summary(model: nn.Module) -> Summary:
    """Which modules of `model` run fast, which could not be replaced and why, and which have no counterpart."""
    replaced: dict[str, str] = {}
    kept: dict[str, str] = {}
    called: dict[str, str] = {}
    others: Counter[str] = Counter()
    for path, module, kind in candidates(model):
        if isinstance(module, _REPLACEMENTS):
            replaced[path] = type(module).__name__
            stages = getattr(type(module), "stages", ())  # not the instance's, which may be anything
            reasons = [f"{stage.operator}: {reason}" for stage in stages if (reason := stage.problem(module))]
            if reasons:
                called[path] = "; ".join(reasons)
        elif kind is not None:
            kept[path] = problem(module, kind) or "accelerate was not called"
        elif next(module.children(), None) is None:
            others[type(module).__name__] += 1
    return Summary(replaced, kept, dict(others), called)
