"""What `benchmarks.unirestorer_experts` prints of what its processes found, and what it counts as memory."""

import argparse

from benchmarks import unirestorer_experts as experts


def test_the_report_divides_what_belongs_together(capsys):
    options = argparse.Namespace(experts=27, size=512, threads=2)
    mib = experts.MIB
    experts.report(
        options,
        write={"base": 24 * mib, "deltas": 208 * mib},
        one={"RssAnon": 20 * mib, "VmRSS": 25 * mib},
        many={
            "RssAnon": 25 * mib,
            "VmRSS": 35 * mib,
            "switch": {"elapsed": 0.02, "processor": 0.02},
            "image": {"elapsed": 1.0, "processor": 1.6},
        },
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "files: base 24.0 MiB, 26 deltas 208.0 MiB"
    assert lines[1] == "own memory: one model 20.0 MiB, 27 experts 25.0 MiB, 1.25 times as much"
    assert lines[2].endswith("one model 25.0 MiB, 27 experts 35.0 MiB, 1.40 times as much")
    assert lines[-1] == "a switch takes 2.0% of an image of 512x512; 2.5% by the processor's"


TAKING = """
import numpy as np
from benchmarks import unirestorer_experts as experts

before = experts.resident()
taken = np.ones(32 * experts.MIB, np.uint8)
after = experts.resident()
assert all(after[name] - before[name] > 0.9 * taken.nbytes for name in before), (before, after)
"""


def test_memory_that_was_taken_counts(fresh):
    """In a process of its own: a large one may have as much left from before."""
    result = fresh.run(TAKING)
    assert result.returncode == 0, result.stderr


def test_time_is_elapsed_and_the_processors():
    noted = []
    with experts.timed(noted):
        sum(range(100_000))
    ((elapsed, processor),) = noted
    assert elapsed > 0 and 0 < processor < 60
