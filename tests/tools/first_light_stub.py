"""A worker of tools.first_light without PyTorch, whose tasks go wrong in every way: argv[1] is the pipe."""

import json
import os
import sys
import time

answers = os.fdopen(int(sys.argv[1]), "w")


def say(message):
    print(json.dumps(message), file=answers, flush=True)


if os.environ.get("STUB") == "does not start":
    print("no such library", file=sys.stderr)
    sys.exit(3)
say({"ready": True})
for line in sys.stdin:
    request = json.loads(line)
    kind = request["kind"]
    if kind == "hang":
        time.sleep(1000)
    say({"row": {"status": "ok", "process": os.getpid()}})
    if kind == "crash":
        print("illegal address", file=sys.stderr, flush=True)
        os.abort()
    say({"usable": kind != "spoil"})
