"""A model card (Markdown) of a small extractor: what it was trained on, how, and what it reaches."""

from __future__ import annotations

import json

from mirage.train.export import kind_text
from mirage.unirestorer.extractor_training import ExtractorRun
from mirage.wording import counted

__all__ = ["extractor_card"]


def extractor_card(run: ExtractorRun, weights: str, *, data: str, licence: str, results: str = "") -> str:
    """The text of the card.

    Args:
        run: that trained it.
        weights: name of the file with them.
        data: what it was trained on.
        licence: what may be done with the weights.
        results: Markdown that tells what they reach, such as what ``mirage unirestorer retrieval`` prints.
    """
    c = run.config
    o, s, seen = c.optimizer, c.schedule, c.data.crop - 2 * run.margin
    decay = "cosine decay" if s.kind == "cosine" else f"constant to step {s.decay_from}, then linear decay"
    count = sum(p.numel() for p in run.extractor.parameters())
    lines = [
        f"# {weights}",
        "",
        f"`SmallExtractor` (`{json.dumps(run.extractor.arguments)}`), {count:,} weights: images to embeddings of their "
        "degradation.",
        "",
        "| | |",
        "|---|---|",
        f"| data | {data} |",
        f"| licence | {licence} |",
        f"| labels | {'; '.join(f'{one.name}: {kind_text(one.kind)}' for one in c.data.sets)} |",
        f"| crops | {c.data.crop} x {c.data.crop} degraded, the middle {seen} x {seen} seen; flips and quarter turns: "
        f"{c.data.augment} |",
        f"| steps | {run.step:,} of {c.data.batch} crops |",
        f"| time | {run.seconds / 60:.0f} minutes, pauses included |",
        f"| loss | supervised contrastive, temperature {run.temperature:g}; another strength of the same type counts "
        f"{run.related:g} |",
        f"| optimiser | {o.name}, betas {o.betas[0]:g} and {o.betas[1]:g}, weight decay {o.weight_decay}, gradients "
        f"clipped to {o.clip} |",
        f"| learning rate | {o.lr:g}, linear warm-up of {counted(s.warmup, 'step')}, {decay} |",
        f"| average | {'none' if c.trainer.ema is None else f'of decay {c.trainer.ema:g}'} |",
        f"| seed | {c.seed} |",
        "",
    ]
    if results:
        lines += ["## Results", "", results.strip(), ""]
    return "\n".join(lines)
