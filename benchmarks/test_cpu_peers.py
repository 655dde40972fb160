"""The network on a CPU beside the engines that people deploy: time, memory, and how time grows with the image.

    pytest benchmarks/test_cpu_peers.py --benchmark-only                (--peers all adds torch.compile)
    pytest benchmarks/test_cpu_peers.py --benchmark-only --networks restormer,adair --code folder/with/checkouts
    pytest benchmarks/test_cpu_peers.py --benchmark-only --peers trial  (tiny networks and images, to try a run)

The networks are those of `benchmarks.networks`: MIRAGE and those that it descends from or is compared with.

How times are taken. Every peer lives in a process of its own, with two threads, as it would be deployed: no engine
meets another's thread pool, allocator or settings. All peers of one problem are built first, each runs once, and what
comes out is compared with the reference in float64 (a peer that is too far off fails). After one more turn to warm
up the timed rounds begin: in each round every peer has its turn, one after the other, so a slow moment of the machine
meets all of them alike. A turn is passes for two seconds, at least one, and counts as the median of its second half
(see `worker.turn`); where sizes of image are compared, whose passes differ a hundredfold, eight seconds. While one
runs the others wait for a message, their pools asleep (ONNX Runtime is told to stop spinning when a pass ends; OpenMP
and TBB threads stop by themselves within the pause before each turn). A pass is timed inside its process. There are as
many rounds as fit into --peer-seconds, at least 5 and at most 25; medians are reported. A test is one peer at one
problem; pytest-benchmark gets its samples through a clock that replays them, since its own loop would time one peer to
the end before the next.

How memory is taken: see `peak_memory`. A fresh process for every figure, one pass in it.
"""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks import peak_memory, peers
from benchmarks.networks import MIRAGES, MODES, NETWORKS
from benchmarks.replay import CLOCK, replay
from benchmarks.worker import Worker, WorkerError

PAUSE_SECONDS = 0.02
TURN_SECONDS, SCALING_TURN_SECONDS = 2.0, 8.0
ROUNDS = (5, 25)
SCALING_SHAPES = ((1, 3, 128, 128), (1, 3, 256, 256), (1, 3, 512, 768), (1, 3, 1024, 1536))
TRIAL_SHAPE = (1, 3, 32, 40)
MEMORY_WITHOUT = ("compile",)
TIMED = ("test_inference", "test_step", "test_scaling")


class Case(NamedTuple):
    """One peer at one problem. Cases of one `round` are timed together."""

    round: str
    peer: str
    mode: str
    variant: str
    shape: tuple[int, ...]

    @property
    def size(self) -> str:
        return "x".join(map(str, self.shape))

    def __str__(self) -> str:
        return f"{self.round.split()[0]}-{self.variant}-{self.size}-{self.peer}"


def cases(mode: str, variant: str, shapes: tuple[tuple[int, ...], ...]) -> list[Case]:
    return [
        Case(f"{mode} {variant} {'x'.join(map(str, shape))}", peer, mode, variant, shape)
        for shape in shapes
        for peer in peers.peers_of(mode, variant)
    ]


def timed(mode: str) -> list[Case]:
    return [case for name, network in NETWORKS.items() for case in cases(mode, name, network.shapes[mode])]


SCALING = [
    Case(f"scaling {variant}", "fast", "inference", variant, shape) for variant in MIRAGES for shape in SCALING_SHAPES
]
MEMORY = [
    case
    for mode in MODES
    for name, network in NETWORKS.items()
    for case in cases(mode, name, (network.memory[mode],))
    if case.peer not in MEMORY_WITHOUT
]


pytestmark = pytest.mark.benchmark(timer=CLOCK.read)


class Options(NamedTuple):
    """Of the run.

    Attributes:
        code: folder with checkouts of published code, empty for none.
        trial: tiny networks and images, and as few rounds as there are.
    """

    threads: int
    seconds: float
    code: str = ""
    trial: bool = False


class Rounds:
    """Measures the selected cases of a round together, when the first of them is asked for."""

    def __init__(self, selected: list[Case], folder: Path, truths: Path, options: Options) -> None:
        self.folder, self.truths, self.options = folder, truths, options
        self._selected: dict[str, list[Case]] = defaultdict(list)
        for case in selected:
            self._selected[case.round].append(case)
        self._measured: dict[Case, tuple[list[float], dict[str, float]] | str] = {}

    def problem(self, case: Case) -> peers.Problem:
        trial = self.options.trial
        shape = TRIAL_SHAPE if trial else case.shape
        return peers.Problem(
            case.mode, case.variant, shape, self.options.threads, str(self.folder), self.options.code, trial
        )

    def measured(self, case: Case) -> tuple[list[float], dict[str, float]]:
        """The samples of a case, and how far its outputs are from the reference.

        Raises:
            WorkerError: its process failed, or what it computes is too far from the reference.
        """
        if case not in self._measured:
            self._measure(self._selected[case.round])
        found = self._measured[case]
        if isinstance(found, str):
            raise WorkerError(found)
        return found

    def _output(self, case: Case) -> Path:
        return self.folder / f"{case.mode}-{case.variant}-{case.size}-{case.peer}.pt"

    def _expected(self, case: Case) -> dict[str, torch.Tensor]:
        """What the reference computes in float64: minutes for a large image, so it is kept from run to run."""
        of_trial = "-trial" if self.options.trial else ""
        path = self.truths / f"{case.mode}-{case.variant}-{case.size}{of_trial}.pt"
        if not path.exists():
            unfinished = path.with_suffix(".unfinished")
            Worker(peers.TRUTH, self.problem(case), unfinished).close()
            unfinished.rename(path)
        return torch.load(path)

    def _start(self, case: Case) -> tuple[Worker, dict[str, float]]:
        peer, output = peers.peer_of(case.mode, case.peer), self._output(case)
        expected = self._expected(case)
        worker = Worker(case.peer, self.problem(case), output)
        outputs = torch.load(output)
        facts, too_far = {}, []
        for name, error, relative in peers.errors(outputs, expected):
            facts |= {f"error_{name}": error, f"relative_error_{name}": relative}
            if not relative <= (limit := peers.farthest(peer, name)):
                too_far.append(f"{name} is {relative:.1e} off, at most {limit:.0e} expected")
        if too_far:
            worker.close()
            raise WorkerError(f"{case.peer} does not compute what the reference does: {', '.join(too_far)}")
        return worker, facts

    def _measure(self, together: list[Case]) -> None:
        workers, facts = {}, {}
        try:
            for case in together:
                try:
                    workers[case], facts[case] = self._start(case)
                except WorkerError as error:
                    self._measured[case] = str(error)
            samples = self._timed(workers)
        finally:
            for worker in workers.values():
                worker.close()
        self._measured |= {case: (samples[case], facts[case]) for case in workers}

    def _timed(self, workers: dict[Case, Worker]) -> dict[Case, list[float]]:
        def seconds(case: Case) -> float:
            time.sleep(PAUSE_SECONDS)
            turn = SCALING_TURN_SECONDS if case in SCALING else TURN_SECONDS
            return workers[case].seconds(0.0 if self.options.trial else turn)

        samples = {case: [] for case in workers}
        if not workers:
            return samples
        start = time.perf_counter()
        for case in workers:
            seconds(case)
        seconds_there_are = 0 if self.options.trial else self.options.seconds
        rounds = min(max(int(seconds_there_are / (time.perf_counter() - start)), ROUNDS[0]), ROUNDS[1])
        for _ in range(rounds):
            for case in workers:
                samples[case].append(seconds(case))
        return samples


def reason_to_skip(case: Case, config: pytest.Config) -> str:
    peer, network = peers.peer_of(case.mode, case.peer), NETWORKS[case.variant]
    wanted = config.getoption("--networks").split(",")
    if config.getoption("--device") != "cpu":
        return "CPU figures: --device cpu"
    if wanted != ["all"] and case.variant not in wanted:
        return f"not among --networks {','.join(wanted)}"
    if problem := network.missing(config.getoption("--code")) or network.without.get(case.peer):
        return problem
    return peer.missing() or (peer.slow if config.getoption("--peers") != "all" else "")


@pytest.fixture(scope="session")
def rounds(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Rounds:
    config = request.config
    timed = [item for item in request.session.items if getattr(item, "originalname", "") in TIMED]
    found = [item.callspec.params["case"] for item in timed]
    selected = [case for case in found if not reason_to_skip(case, config)]
    folder = tmp_path_factory.mktemp("peers")
    truths = config.cache.mkdir(f"mirage-truths-{peers.fingerprint()}")
    named = (config.getoption(f"--{name}") for name in ("threads", "peer-seconds", "code"))
    return Rounds(selected, folder, truths, Options(*named, trial=config.getoption("--peers") == "trial"))


@pytest.fixture
def facts(case: Case, request: pytest.FixtureRequest, benchmark: Any) -> dict[str, Any]:
    """extra_info of the row, or a skip with its reason."""
    if reason := reason_to_skip(case, request.config):
        pytest.skip(reason)
    peer = peers.peer_of(case.mode, case.peer)
    benchmark.group = case.round
    benchmark.extra_info.update(
        peer=case.peer,
        label=peer.label,
        mode=case.mode,
        variant=case.variant,
        shape=list(TRIAL_SHAPE if request.config.getoption("--peers") == "trial" else case.shape),
        dtype=peer.dtype,
        versions=peers.versions(),
    )
    return benchmark.extra_info


def time_case(case: Case, rounds: Rounds, facts: dict[str, Any], benchmark: Any) -> None:
    samples, errors = rounds.measured(case)
    facts.update(errors)
    replay(benchmark, samples)


@pytest.mark.parametrize("case", timed("inference"), ids=str)
def test_inference(case, rounds, facts, benchmark):
    time_case(case, rounds, facts, benchmark)


@pytest.mark.parametrize("case", timed("step"), ids=str)
def test_step(case, rounds, facts, benchmark):
    time_case(case, rounds, facts, benchmark)


@pytest.mark.parametrize("case", SCALING, ids=str)
def test_scaling(case, rounds, facts, benchmark):
    time_case(case, rounds, facts, benchmark)


@pytest.mark.parametrize("case", MEMORY, ids=str)
def test_memory(case, rounds, facts, benchmark):
    problem = rounds.problem(case)
    row = peak_memory.measure_fresh(case.peer, problem)
    benchmark.group = f"memory, {case.round}"
    facts.update({name: row[name] for name in ("rss_mib", "code_mib", "tracker_mib", "built_mib")})
    replay(benchmark, [row["seconds"]])
