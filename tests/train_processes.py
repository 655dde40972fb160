"""What each of two processes does in tests/mirage/train/test_train_processes.py; a module that they can import."""

from __future__ import annotations

import torch
from train_cases import record, settings

from mirage.train import Run

CASES = {  # the SPD head used, not used, and not there; batch norm with statistics of its own or fixed ones
    "fixed": (["model.drop_path=0"], True),
    "trained": (["model.drop_path=0"], False),
    "unused": (["loss.contrastive_weight=0"], False),
    "absent": (["model.spd=false"], False),
    "passes": (["trainer.accumulate=2"], False),
}
COMMON = ["data.batch=4", "optimizer.clip=null", "schedule.kind=wsd"]


def begin(root, name, fabric=None, *more):
    overrides, fixed = CASES[name]
    run = Run(settings(root, *COMMON, *overrides, *more, out=name), fabric)
    run.model.train(not fixed)
    return run


def work(fabric, root):
    torch.set_num_threads(1)
    results = {}
    for name in ("fixed", "trained", "unused", "absent"):
        run = begin(root, name, fabric)
        results[name] = record(run, 3)
    run.save()
    run = begin(root, "passes", fabric)
    run.train()
    results["passes"] = {"weights": run.network.state_dict()}
    results["messages"] = []
    for choice in ("stop", "skip"):
        run = Run(settings(root, *COMMON, f"trainer.on_nan={choice}", out=f"nan-{choice}"), fabric)
        if fabric.global_rank == 1:
            run.network.output.register_forward_hook(_poison)
        try:
            results["messages"].append(record(run, 1)["values"])
        except FloatingPointError as error:
            results["messages"].append(str(error))
        results[f"steps-{choice}"] = run.step
    torch.save(results, root / f"rank{fabric.global_rank}.pt")


def _poison(module, inputs, output):
    return output * float("nan")
