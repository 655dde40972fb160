"""benchmarks/peak_memory.py: what a pass adds, in this process and in one of its own."""

import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import networks, peak_memory, peers, worker
from mirage.complexity import ALLOCATION_QUANTUM, measure

MIB = peak_memory.MIB
SHAPE = (1, 3, 16, 16)


@pytest.mark.skipif(not peak_memory.RESET.exists(), reason="the peak can only be reset on Linux")
def test_only_what_happens_inside_counts():
    before = np.ones(100 * MIB, np.uint8)
    del before  # a higher peak than the one inside
    with peak_memory.PeakMemory() as memory:
        inside = np.ones(60 * MIB, np.uint8)
        del inside
        kept = np.ones(40 * MIB, np.uint8)  # malloc maps what is above 32 MiB, and never reuses freed pages for it
    assert 59 * MIB < memory.risen < 70 * MIB
    assert 39 * MIB < memory.kept < 50 * MIB
    assert kept.nbytes == 40 * MIB and memory.files < 5 * MIB


def test_a_fresh_process_is_measured():
    problem = peers.Problem("forward", "tiny", SHAPE, threads=1)
    row = peak_memory.measure_fresh("checkpoint", problem)
    assert (row["peer"], row["mode"], row["variant"], row["shape"]) == ("checkpoint", "forward", "tiny", list(SHAPE))
    assert row["rss_mib"] > row["code_mib"] >= 0 and row["seconds"] > 0
    assert row["built_mib"] > 6.2 * 4 * 1e6 / MIB  # the weights alone

    model = networks.make("tiny")
    tracked = measure(peers.checkpoint_blocks(model), x=peers.make_images(SHAPE)[0]).peak_memory_bytes
    clean = -(-4 * 3 * 16 * 16 // ALLOCATION_QUANTUM) * ALLOCATION_QUANTUM  # the target of a step, there as well
    assert row["tracker_mib"] * MIB == tracked + clean


def test_the_command_prints_json():
    arguments = ["--peer", "fast", "--shape", *map(str, SHAPE), "--threads", "1"]
    command = [sys.executable, "-m", "benchmarks.peak_memory", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=worker.environment(1))
    row = json.loads(done.stdout)
    assert (row["peer"], row["mode"]) == ("fast", "inference") and row["tracker_mib"] > 23


def test_a_failure_is_reported():
    with pytest.raises(RuntimeError, match="multiples of 8"):
        peak_memory.measure_fresh("eager", peers.Problem("inference", "tiny", (1, 3, 12, 16), threads=1))
