"""Small configurations and pictures that the tests of training share."""

from __future__ import annotations

import numpy as np

from mirage.train import load_config

SMALL = {"dim": 6, "num_blocks": [1, 1, 1, 1], "num_refinement_blocks": 1, "spd_shallow_channels": 4}
SMALL |= {"spd_latent_channels": 4, "spd_features": 8}

CONFIG = """
model: {size: tiny, drop_path: 0.1, arguments: ARGUMENTS}
optimizer: {lr: 2e-3, clip: 1.0}
schedule: {steps: 6}
data:
  sets: [{name: noise, clean: clean, sigma: [15, 50]}]
  crop: 16
  batch: 2
trainer: {accelerator: cpu, threads: 1}
output: {checkpoint_minutes: null, log_steps: 1}
"""


def write_pictures(folder, count=4, size=(24, 32), seed=0):
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        coarse.resize(size[::-1], Image.Resampling.BICUBIC).save(folder / f"{i:02d}.png")
    return folder


def settings(root, *overrides, out="run"):
    """A configuration that trains a network of dim 6 on the pictures of ``root/clean``, for 6 steps."""
    path = root / "config.yaml"
    if not path.exists():
        path.write_text(CONFIG.replace("ARGUMENTS", str(SMALL)))
    return load_config(path, [f"data.root={root}", f"output.folder={root / out}", *overrides])


def record(run, steps):
    """Take steps by hand; what each one returned, and the gradients before it changed a weight."""
    from mirage.train.data import batches
    from mirage.train.run import _plain

    gradients = []
    names = [name for name, p in run.network.named_parameters() if p.requires_grad]
    weights = [p for p in run.network.parameters() if p.requires_grad]
    handle = _plain(run.optimizer).register_step_pre_hook(
        lambda *_: gradients.append({name: p.grad.clone() for name, p in zip(names, weights, strict=True)})
    )
    stream = batches(run.data, run.samples, steps, 1, run.fabric.global_rank, run.fabric.world_size)
    values = [run._step([next(stream)]) for _ in range(steps)]
    handle.remove()
    return {
        "values": values,
        "gradients": gradients,
        "weights": {k: v.clone() for k, v in run.network.state_dict().items()},
    }
