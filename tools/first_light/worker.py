"""The process that tasks run in: ``python -m tools.first_light.worker FD``. Requests come as lines of JSON on standard
input; answers go to the file descriptor: each row of a task as it is there, then whether the GPU can still be used."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch

from mirage_kernels._runtime import dispatch
from tools.first_light import safety, speed, truth
from tools.first_light.pool import Row

KINDS: dict[str, Callable[..., Iterator[Row]]] = {**truth.KINDS, **speed.KINDS, **safety.KINDS}
LONGEST = 600
"""Characters of an error that go into its row."""


def attempt(function: Callable[..., Iterator[Row]], arguments: dict[str, Any]) -> Iterator[Row]:
    """The rows of a task, "ok" unless they say otherwise; the last one is the exception that ended it, if one did."""
    start = time.perf_counter()
    dispatch._last_used.clear()  # what is said of the task is not to be of an earlier one
    dispatch._declined.clear()

    def since(row: Row) -> Row:
        return {"status": "ok", **row, "seconds": round(time.perf_counter() - start, 2)}

    try:
        for row in function(**arguments):
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # an error of a kernel belongs to this row
            yield since(row)
    except torch.OutOfMemoryError as error:
        yield since({"status": "out of memory", "problem": shortened(error)})
    except Exception as error:  # whatever a kernel or a compiler raises is this task's result
        yield since({"status": "failed", "problem": shortened(error), "at": place_of(error)})


def shortened(error: BaseException) -> str:
    """Its type and message; of a long message, such as that of a compiler, beginning and end."""
    text = f"{type(error).__name__}: {error}".strip()
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"


def place_of(error: BaseException) -> str:
    """The innermost calls that led to it."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    return " > ".join(f"{os.path.basename(f.filename)}:{f.lineno} {f.name}" for f in frames)


def cleaned_up() -> bool:
    """Free what a task has left; whether the GPU can still be used: after an illegal address nothing runs any more."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    if not torch.cuda.is_available():
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return bool((torch.ones(2, device="cuda") + 1).sum().item() == 4)
    except RuntimeError:
        return False


def main() -> None:
    answers = os.fdopen(int(sys.argv[1]), "w")

    def say(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    say({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        for row in attempt(KINDS[request["kind"]], request["arguments"]):
            say({"row": row})
        say({"usable": cleaned_up()})


if __name__ == "__main__":
    main()
