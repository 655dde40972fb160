"""What experts of one base take: ``python -m benchmarks.unirestorer_experts``.

MIRAGE-T is the root, 26 others are LoRA of rank 8 with norms on it (random ones, which take what trained ones take), in
a folder of `ExpertStore.save`. Three processes, one after the other: one writes the folder; one loads the base alone,
as `mirage.Restorer` does; one loads the store with a budget for one expert and has each of them in memory once.

Memory is the rise of a process's own (RssAnon) and of all (VmRSS, mapped files counted) over what it has once
everything is imported, weights alone, before any image. Time is that of an image and of the switch to another expert,
in turns, elapsed and of the processor (user and system, all threads); the latter changes little where other work keeps
the machine busy. The share is that of the elapsed times, and of the switch's processor time in the image's by thread.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.worker import environment

MIB = 2**20


def resident() -> dict[str, int]:
    """Bytes of this process: its own, and all that is resident."""
    text = Path("/proc/self/status").read_text()
    return {name: int(re.search(rf"^{name}:\s+(\d+)", text, re.M)[1]) * 1024 for name in ("RssAnon", "VmRSS")}


def import_all() -> None:
    """What any of the processes needs, so that its memory is no part of the rise."""
    for name in ("mirage.fast", "mirage.networks", "mirage.restore.loading", "mirage.unirestorer.store", "safetensors"):
        importlib.import_module(name)


def write(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    import mirage
    from mirage.unirestorer import ExpertStore, add_lora, lora_parameters, remove_lora

    torch.manual_seed(0)
    base = mirage.mirage_tiny().eval()
    store = ExpertStore(base)
    store.add("0")
    for number in range(1, options.experts):
        add_lora(base, options.rank)
        with torch.no_grad():
            for parameter in lora_parameters(base):
                parameter.add_(1e-3 * torch.randn_like(parameter))
        store.add(str(number), base)
        remove_lora(base)
    store.save(options.folder)
    sizes = {path.name: path.stat().st_size for path in options.folder.glob("*.safetensors")}
    base_size = next(size for name, size in sizes.items() if name.startswith("base-"))
    return {"base": base_size, "deltas": sum(sizes.values()) - base_size}


def one(options: argparse.Namespace) -> dict[str, Any]:
    """The base alone."""
    import_all()
    from mirage import fast
    from mirage.restore.loading import load_model

    before = resident()
    model = load_model(next(options.folder.glob("base-*.safetensors")))
    after = resident()
    assert not fast.summary(model).called
    return {name: after[name] - before[name] for name in before}


def many(options: argparse.Namespace) -> dict[str, Any]:
    """All experts, one in memory at a time; then images and switches in turns."""
    import_all()
    import torch

    from mirage.unirestorer import ExpertStore

    torch.set_num_threads(options.threads)
    before = resident()
    store = ExpertStore.load(options.folder, memory=1, device="cpu")
    for name in store.names:
        with store.network(name):
            pass
    after = resident()
    found: dict[str, Any] = {name: after[name] - before[name] for name in before}
    image = torch.rand(1, 3, options.size, options.size, generator=torch.Generator().manual_seed(1))
    store.restore(image, [store.names[0]])  # what first calls set up
    times: dict[str, list[tuple[float, float]]] = {"switch": [], "image": []}
    for turn in range(options.turns):
        name = store.names[(turn + 1) % len(store)]
        with timed(times["switch"]), store.network(name):
            pass
        with timed(times["image"]):
            store.restore(image, [name])
    for what, pairs in times.items():
        elapsed, processor = zip(*pairs, strict=True)
        found[what] = {"elapsed": statistics.median(elapsed), "processor": statistics.median(processor)}
    return found


class timed:
    """Notes the elapsed and the processor seconds of a block."""

    def __init__(self, into: list[tuple[float, float]]) -> None:
        self.into = into

    def __enter__(self) -> None:
        self.begin = time.perf_counter(), time.process_time()

    def __exit__(self, *error: object) -> None:
        self.into.append((time.perf_counter() - self.begin[0], time.process_time() - self.begin[1]))


STEPS = {"write": write, "one": one, "many": many}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--experts", type=int, default=27)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--size", type=int, default=512, help="side of the image")
    parser.add_argument("--turns", type=int, default=5, help="images, each with another expert")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        print(json.dumps(STEPS[options.step](options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for step in STEPS:
            command = [sys.executable, "-m", "benchmarks.unirestorer_experts", *sys.argv[1:]]
            command += ["--step", step, "--folder", folder]
            done = subprocess.run(command, capture_output=True, text=True, env=environment(options.threads))
            if done.returncode:
                sys.exit(done.stderr)
            found[step] = json.loads(done.stdout.splitlines()[-1])
    report(options, **found)


def report(options: argparse.Namespace, write: dict[str, Any], one: dict[str, Any], many: dict[str, Any]) -> None:
    print(f"files: base {write['base'] / MIB:.1f} MiB, {options.experts - 1} deltas {write['deltas'] / MIB:.1f} MiB")
    for name, what in (("RssAnon", "own memory"), ("VmRSS", "resident, mapped files counted")):
        alone, all_of_them = one[name], many[name]
        print(
            f"{what}: one model {alone / MIB:.1f} MiB, {options.experts} experts {all_of_them / MIB:.1f} MiB, "
            f"{all_of_them / alone:.2f} times as much"
        )
    for what in ("image", "switch"):
        print(f"{what}: {many[what]['elapsed']:.4f} s elapsed, {many[what]['processor']:.4f} s of the processor")
    elapsed = many["switch"]["elapsed"] / many["image"]["elapsed"]
    processor = many["switch"]["processor"] / (many["image"]["processor"] / options.threads)
    print(
        f"a switch takes {elapsed:.1%} of an image of {options.size}x{options.size}; {processor:.1%} by the processor's"
    )


if __name__ == "__main__":
    main()
