"""The engines that the CPU figures stand beside: how each of them is built, and what it takes to be one.

A problem is a network, what is asked of it and the shape of the image. `build` turns a peer and a problem into a
`Runner`, whose `run` is what gets timed and whose `outputs` is compared with the reference's. Every process that builds
the same problem gets the same weights, the same image and the same random draws.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mirage
import mirage.fast
from benchmarks import networks


@dataclass(frozen=True)
class Problem:
    """What is asked of a network.

    Attributes:
        mode: "inference", "forward" (training mode, with autograd) or "step" (forward, loss and backward).
        variant: one of `networks.NETWORKS`.
        shape: [B, 3, H, W] of the image.
        threads: threads of every engine.
        folder: where exported networks are kept, shared by the processes of one run; empty for one of this process.
        code: folder with checkouts of published code, for the networks that need one.
        trial: a tiny network in place of the published one.
    """

    mode: str
    variant: str
    shape: tuple[int, ...]
    threads: int = 2
    folder: str = ""
    code: str = ""
    trial: bool = False

    @property
    def network(self) -> networks.Network:
        return networks.NETWORKS[self.variant]

    def model(self) -> nn.Module:
        """The reference."""
        return networks.make(self.variant, self.code, self.trial)

    @property
    def size(self) -> str:
        return "x".join(map(str, self.shape))


@dataclass(frozen=True)
class Runner:
    """A peer ready to run. `tensors` are those that exist before a pass: weights, buffers and images."""

    run: Callable[[], Any]
    outputs: Callable[[Any], dict[str, Tensor]]
    tensors: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Peer:
    """One engine.

    Attributes:
        label: its name in tables.
        build: makes a `Runner` of a problem.
        training: whether it runs training modes (else inference).
        dtype: what it computes in; decides how far it may be from the reference.
        packages: what has to be installed besides PyTorch.
        slow: built only on request, with the reason.
    """

    label: str
    build: Callable[[Problem], Runner]
    training: bool = False
    dtype: str = "float32"
    packages: tuple[str, ...] = ()
    slow: str = ""

    def missing(self) -> str:
        """Why it cannot run here; empty when it can."""
        absent = [name for name in self.packages if importlib.util.find_spec(name) is None]
        return f"{', '.join(absent)} not installed (pip install .[peers])" if absent else ""


def versions() -> dict[str, str]:
    """The installed version of every engine that is not PyTorch."""
    found = {}
    for name in ("onnx", "onnxruntime", "openvino"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


# ---- what all of them share ----------------------------------------------------------------------------------------


def make_images(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Degraded and clean image."""
    generator = torch.Generator().manual_seed(1)
    clean = torch.rand(shape, generator=generator)
    return (clean + 0.1 * torch.randn(shape, generator=generator)).clamp(0, 1), clean


def _state(model: nn.Module) -> tuple[Tensor, ...]:
    return (*model.parameters(), *model.buffers())


# ---- inference -----------------------------------------------------------------------------------------------------


def _inference_runner(
    problem: Problem, model: Callable[[Tensor], Tensor], image: Tensor, state: tuple[Tensor, ...], **autocast: Any
) -> Runner:
    @torch.inference_mode()
    def run() -> Tensor:
        with networks.repeatable(problem.variant, image.dtype):
            if not autocast:
                return model(image)
            with torch.autocast("cpu", **autocast):
                return model(image)

    def outputs(restored: Tensor) -> dict[str, Tensor]:
        return {"restored": restored.to(torch.promote_types(restored.dtype, torch.float32))}

    return Runner(run, outputs, (*state, image))


def _eager(problem: Problem, autocast: dict[str, Any] | None = None, layout=torch.contiguous_format) -> Runner:
    model = problem.model().eval().to(memory_format=layout)
    image = make_images(problem.shape)[0].contiguous(memory_format=layout)
    return _inference_runner(problem, model, image, _state(model), **(autocast or {}))


def _compiled(problem: Problem) -> Runner:
    model = problem.model().eval()
    return _inference_runner(problem, torch.compile(model), make_images(problem.shape)[0], _state(model))


def _fast(problem: Problem, dtype: torch.dtype = torch.float32) -> Runner:
    model = mirage.fast.accelerate(problem.model()).eval().to(dtype)
    return _inference_runner(problem, model, make_images(problem.shape)[0].to(dtype), _state(model))


def onnx_file(problem: Problem) -> Path:
    """The reference as an ONNX file for one shape, written once per folder, by a process of its own: tracing leaves
    memory behind that a measured process must not have."""
    path = Path(problem.folder or _own_folder().name) / f"{problem.variant}-{problem.size}.onnx"
    if not path.exists():
        command = [sys.executable, "-m", "benchmarks.peers", json.dumps(asdict(problem)), str(path)]
        subprocess.run(command, check=True, stdout=sys.stderr, cwd=Path(__file__).parent.parent)
    return path


@functools.cache
def _own_folder() -> tempfile.TemporaryDirectory[str]:
    """Removed when this process ends."""
    return tempfile.TemporaryDirectory()


def export(problem: Problem, path: Path) -> None:
    """Write the reference as ONNX. The traced graph: it fixes every size, the batch of generated kernels included."""
    unfinished = path.with_suffix(".unfinished")
    names = {"input_names": ["image"], "output_names": ["restored"]}
    model = problem.model().eval()
    problem.network.prepare_export(model)
    with torch.no_grad():
        torch.onnx.export(model, (make_images(problem.shape)[0],), unfinished, dynamo=False, **names)
    unfinished.rename(path)


def _onnxruntime(problem: Problem) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = problem.threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.force_spinning_stop", "1")  # spin within a pass, never after it
    session = onnxruntime.InferenceSession(str(onnx_file(problem)), options, providers=["CPUExecutionProvider"])
    feed = {"image": make_images(problem.shape)[0].numpy()}
    return Runner(lambda: session.run(None, feed)[0], lambda restored: {"restored": torch.from_numpy(restored).float()})


def _openvino(problem: Problem, **hints: str) -> Runner:
    import openvino

    properties = {"INFERENCE_NUM_THREADS": problem.threads, "PERFORMANCE_HINT": "LATENCY", **hints}
    request = openvino.Core().compile_model(str(onnx_file(problem)), "CPU", properties).create_infer_request()
    image = make_images(problem.shape)[0].numpy()

    def run() -> Any:
        return request.infer([image], share_inputs=True, share_outputs=True)[0]

    return Runner(run, lambda restored: {"restored": torch.from_numpy(restored.copy()).float()})


# ---- training ------------------------------------------------------------------------------------------------------


def checkpoint_blocks(model: nn.Module) -> nn.Module:
    """Activation checkpointing of every block of MIRAGE: it keeps its input, and runs again in the backward pass."""
    for module in model.modules():
        if isinstance(module, mirage.blocks.TransformerBlock):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)
    return model


def _training_runner(
    problem: Problem, prepare: Callable[[nn.Module], nn.Module], dtype: torch.dtype = torch.float32
) -> Runner:
    model = prepare(problem.model()).train().to(dtype)
    image, clean = (t.to(dtype) for t in make_images(problem.shape))
    network = problem.network

    def forward() -> Any:
        with networks.repeatable(problem.variant, dtype):
            return network.call(model, image)

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        loss = network.loss(model, forward(), clean)
        loss.backward()
        return loss.detach()

    def gradients(loss: Tensor) -> dict[str, Tensor]:
        flat = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return {"loss": loss, "gradients": torch.cat(flat)}

    tensors = (*_state(model), image, clean)
    if problem.mode == "forward":
        return Runner(forward, lambda out: {"restored": (out[0] if isinstance(out, tuple) else out).detach()}, tensors)
    return Runner(step, gradients, tensors)


def _truth(problem: Problem) -> Runner:
    """The reference in float64: what every peer's outputs are compared with."""
    if problem.mode != "inference":
        return _training_runner(problem, checkpoint_blocks, torch.float64)
    model = problem.model().eval().double()
    return _inference_runner(problem, model, make_images(problem.shape)[0].double(), _state(model))


def _fast_training(memory: str) -> Callable[[Problem], Runner]:
    return lambda problem: _training_runner(problem, partial(mirage.fast.accelerate, memory=memory))


BFLOAT16 = {"dtype": torch.bfloat16}
ONNX = ("onnx", "onnxruntime")
COMPILES = "compiling takes minutes: asked for with --peers all"

INFERENCE = {
    "eager": Peer("PyTorch eager", _eager),
    "channels_last": Peer("PyTorch eager, channels_last", partial(_eager, layout=torch.channels_last)),
    "autocast": Peer("PyTorch eager, bf16 autocast", partial(_eager, autocast=BFLOAT16), dtype="bfloat16"),
    "compile": Peer("torch.compile", _compiled, slow=COMPILES),
    "onnxruntime": Peer("ONNX Runtime", _onnxruntime, packages=ONNX),
    "openvino-f32": Peer(
        "OpenVINO, f32", partial(_openvino, INFERENCE_PRECISION_HINT="f32"), packages=("onnx", "openvino")
    ),
    "openvino": Peer("OpenVINO, default precision", _openvino, dtype="bfloat16", packages=("onnx", "openvino")),
    "fast": Peer("mirage.fast", _fast),
    "fast-bf16": Peer("mirage.fast, bf16", partial(_fast, dtype=torch.bfloat16), dtype="bfloat16"),
}
TRAINING = {
    "eager": Peer("PyTorch eager", lambda problem: _training_runner(problem, lambda model: model), training=True),
    "checkpoint": Peer(
        "PyTorch eager, blocks checkpointed", lambda p: _training_runner(p, checkpoint_blocks), training=True
    ),
    "fast-low": Peer('mirage.fast, memory="low"', _fast_training("low"), training=True),
    "fast-fast": Peer('mirage.fast, memory="fast"', _fast_training("fast"), training=True),
}
TRUTH = "truth"
_OTHERS = {TRUTH: Peer("PyTorch eager, float64", _truth, dtype="float64")}

FARTHEST = {"float32": 1e-4, "bfloat16": 5e-2}
"""Largest error by dtype, over the largest magnitude of the truth."""
FARTHEST_GRADIENTS = 1e-3
"""Largest norm of the gradients' difference over that of the truth. The loss is an L1 norm: where a restored pixel
equals the clean one up to rounding its gradient has either sign, and one such pixel of 128x128 makes 2e-4."""


def peers_of(mode: str, variant: str | None = None) -> dict[str, Peer]:
    """The peers that run a mode (of a network), by name, the reference first."""
    found = INFERENCE if mode == "inference" else TRAINING
    chosen = None if variant is None else networks.NETWORKS[variant].peers
    if chosen is None:
        return found
    return {name: found[name] for name in chosen["inference" if mode == "inference" else "training"]}


def peer_of(mode: str, name: str) -> Peer:
    """A peer of the mode, or one that only some problems ask for."""
    return (_OTHERS | peers_of(mode))[name]


def fingerprint() -> str:
    """Of all that decides what the reference computes of a problem."""
    ours = Path(mirage.__file__).parent
    names = ("blocks", "model", "losses")
    sources = [Path(__file__), Path(networks.__file__), *(ours / f"{name}.py" for name in names)]
    sources += sorted((ours / "networks").glob("*.py"))
    content = b"".join(path.read_bytes() for path in sources) + torch.__version__.encode()
    return hashlib.sha256(content).hexdigest()[:16]


def farthest(peer: Peer, output: str) -> float:
    """The largest relative error that counts as the same result."""
    return FARTHEST_GRADIENTS if output == "gradients" else FARTHEST[peer.dtype]


def errors(outputs: dict[str, Tensor], expected: dict[str, Tensor]) -> Iterator[tuple[str, float, float]]:
    """Name, error and relative error of each output: of the largest element, of gradients the norm."""
    for name, reference in expected.items():
        difference = outputs[name] - reference
        order = 2 if name == "gradients" else float("inf")
        error, scale = (torch.linalg.vector_norm(t.double(), order).item() for t in (difference, reference))
        yield name, error, error / scale


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    export(Problem(**{**given, "shape": tuple(given["shape"])}), Path(sys.argv[2]))
