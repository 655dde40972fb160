"""The golden cases: weights anyone can regenerate, and what the released network computes with them in fp64.

The released network's cases lie in ``$MIRAGE_SHARED/golden`` or ``<repository>/../shared/golden``; a test that wants
one skips where it is absent. ``tests/data`` holds a small case of our own, written by ``python tests/golden.py`` from
the fp64 reference (which the released cases pin).

Any implementation is held to the same comparisons::

    factory = lambda **options: accelerate(mirage_tiny(**options))
    assert_within(compare_model("mirage_tiny_64x64", factory, torch.float32, "train"))

The expected tensors are stored in fp32, so that 3e-8 is the smallest error (relative, by norm) to be seen.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mirage import MIRAGE, mirage_small, mirage_tiny
from mirage.blocks import TransformerBlock
from mirage.losses import MirageLoss

REPOSITORY = Path(__file__).resolve().parent.parent
OWN_DATA = Path(__file__).resolve().parent / "data"
OWN_CASE = "mirage_mini_16x24"


def mirage_mini(**overrides) -> MIRAGE:
    """The model of our own case: one block per level, odd hidden widths, every branch and both ends of the SPD head."""
    sizes = {"dim": 12, "num_blocks": (1, 1, 1, 1), "num_refinement_blocks": 1, "heads": (1, 1, 2, 4)}
    return MIRAGE(**{**sizes, **overrides})


MODEL_CASES: dict[str, Callable[..., nn.Module]] = {
    OWN_CASE: mirage_mini,
    "mirage_tiny_64x64": mirage_tiny,
    "mirage_small_72x40": mirage_small,
}
BLOCK_CASES: dict[str, tuple[int, int]] = {  # (dim, heads)
    "block_dim24_heads1_33x47": (24, 1),
    "block_dim48_heads1_16x24": (48, 1),
    "block_dim48_heads2_19x32": (48, 2),
    "block_dim60_heads2_21x20": (60, 2),
    "block_dim192_heads8_12x9": (192, 8),
}
STATE_DICTS: dict[str, Callable[..., nn.Module]] = {
    "mirage_tiny_state_dict": mirage_tiny,
    "mirage_small_state_dict": mirage_small,
}

OUTPUT_LIMIT = {torch.float64: 1e-7, torch.float32: 1e-5}
GRADIENT_LIMIT = {torch.float64: 1e-6, torch.float32: 2e-5}
SCALAR_GRADIENT_LIMIT = {torch.float64: 1e-6, torch.float32: 2e-4}  # alpha_* and temperature: sums that cancel


class Comparison(NamedTuple):
    """One quantity of a case: its relative error and the error allowed."""

    error: float
    limit: float


Results = dict[str, dict[str, Comparison]]  # group -> name -> comparison


def golden_file(name: str) -> Path:
    """The path of a golden file; skips the running test where it is absent."""
    folders = [OWN_DATA, REPOSITORY.parent / "shared" / "golden"]
    if os.environ.get("MIRAGE_SHARED"):
        folders[1] = Path(os.environ["MIRAGE_SHARED"]) / "golden"
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    pytest.skip(f"golden file {name} is not in {folders[1]} (set MIRAGE_SHARED to the folder that holds golden/)")


def noise_of(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The random numbers that a name stands for, normal, in fp64."""
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)


def regenerate(name: str, shape: tuple[int, ...]) -> Tensor:
    """The golden value of one parameter or buffer, from its name alone."""
    noise = noise_of(name, shape)
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return torch.zeros(shape, dtype=torch.int64)
    if leaf == "running_var":
        value = 0.5 + np.abs(noise)
    elif leaf in ("running_mean", "bias"):
        value = 0.1 * noise
    elif leaf.startswith("alpha_") or leaf == "temperature" or len(shape) == 1:
        value = 1 + 0.1 * noise
    else:
        value = noise / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(np.asarray(value, dtype=np.float32))


def load_golden_weights(module: nn.Module) -> nn.Module:
    """Fill a module with the golden weights of its own names, in place, and return it."""
    module.load_state_dict({k: regenerate(k, tuple(v.shape)) for k, v in module.state_dict().items()})
    return module


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the expected tensor, in fp64. NaN stays NaN and passes no limit."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    return float((actual - expected).norm() / expected.norm())


def gradient_limit(name: str, dtype: torch.dtype) -> float:
    leaf = name.rsplit(".", 1)[-1]
    scalar = leaf.startswith("alpha_") or leaf == "temperature"
    return (SCALAR_GRADIENT_LIMIT if scalar else GRADIENT_LIMIT)[dtype]


def checksum(x: Tensor) -> Tensor:
    """Mean, standard deviation (biased) and largest magnitude of a feature map: three fp64 numbers."""
    x = x.detach().double().cpu()
    return torch.stack((x.mean(), x.std(unbiased=False), x.abs().max()))


def checksum_error(actual: Tensor, expected: Tensor) -> float:
    """Largest error of the three numbers: mean and deviation relative to the deviation, the maximum to itself."""
    scale = torch.stack((expected[1], expected[1], expected[2]))
    return float(((actual - expected).abs() / scale).max())


def assert_within(results: Results) -> None:
    """Fail, listing every comparison past its limit, unless all are within; NaN is past any limit."""
    assert any(results.values()), "nothing was compared"
    bad = [
        f"{group} {name}: error {c.error:.3g}, allowed {c.limit:.1g}"
        for group, comparisons in results.items()
        for name, c in comparisons.items()
        if not c.error <= c.limit
    ]
    assert not bad, "\n".join(bad)


def check_block(
    case: str,
    block_factory: Callable[..., nn.Module] = TransformerBlock,
    dtype: torch.dtype = torch.float64,
    mode: str = "eval",
    device: str = "cpu",
) -> Results:
    """Compare and assert; see `compare_block`."""
    results = compare_block(case, block_factory, dtype, mode, device)
    assert_within(results)
    return results


def compare_model(
    case: str,
    model_factory: Callable[..., nn.Module],
    dtype: torch.dtype = torch.float64,
    mode: str = "eval",
    device: str = "cpu",
) -> Results:
    """Run one of `MODEL_CASES` and return every comparison its file allows.

    Args:
        case: the file's name without suffix.
        model_factory: called with ``drop_path=0.0``; gives a model of that case whose state_dict is the reference's and
            whose ``model(x, return_spd=True)`` is the reference's.
        dtype: fp32 or fp64.
        mode: ``"eval"`` (outputs, features) or ``"train"`` (outputs, losses, gradients, buffers).
    """
    with np.load(golden_file(f"{case}.npz")) as data:
        expected = {key: torch.from_numpy(np.asarray(data[key])) for key in data.files}
    model = load_golden_weights(model_factory(drop_path=0.0)).to(device, dtype)
    image, target = (expected[key].to(device, dtype) for key in ("input", "target"))
    if mode == "eval":
        return _compare_eval(model.eval(), image, expected, dtype)
    if mode == "train":
        return _compare_train(model.train(), image, target, expected, dtype)
    raise ValueError(f"mode must be 'eval' or 'train', got {mode!r}")


def _compare_eval(model: nn.Module, image: Tensor, expected: Mapping[str, Tensor], dtype: torch.dtype) -> Results:
    limit = OUTPUT_LIMIT[dtype]
    features: dict[str, Tensor] = {}
    handles = [
        child.register_forward_hook(lambda _m, _i, out, name=name: features.__setitem__(name, out.detach()))
        for name, child in model.named_children()
    ]
    try:
        with torch.no_grad():
            restored, embeddings = model(image, return_spd=True)
    finally:
        for handle in handles:
            handle.remove()
    _, terms = MirageLoss("released")((restored, embeddings), restored)
    results: Results = {
        "outputs": {"restored": Comparison(relative_error(restored, expected["eval.restored"]), limit)},
        "losses": {
            "contrastive": Comparison(relative_error(0.01 * terms.contrastive, expected["eval.spd_loss_x0.01"]), limit)
        },
        "features": {},
        "checksums": {},
    }
    for key, value in expected.items():
        name = key.rsplit(".", 1)[-1]
        if key.startswith("eval.feature."):
            results["features"][name] = Comparison(relative_error(features[name], value), limit)
        elif key.startswith("eval.feature_checksum."):
            results["checksums"][name] = Comparison(checksum_error(checksum(features[name]), value), limit)
    return results


def _compare_train(
    model: nn.Module, image: Tensor, target: Tensor, expected: Mapping[str, Tensor], dtype: torch.dtype
) -> Results:
    limit = OUTPUT_LIMIT[dtype]
    prediction = model(image, return_spd=True)
    total, terms = MirageLoss("released")(prediction, target)
    total.backward()
    losses = {"total": total, "l1": terms.l1, "fourier": terms.fourier, "spd_loss_x0.01": 0.01 * terms.contrastive}
    results: Results = {
        "outputs": {"restored": Comparison(relative_error(prediction[0], expected["train.restored"]), limit)},
        "losses": {k: Comparison(relative_error(v, expected[f"train.{k}"]), limit) for k, v in losses.items()},
        "gradient norms": {},
        "gradients": {},
        "buffers": {},
    }
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    for key, value in expected.items():
        kind, _, name = key.removeprefix("train.").partition(".")
        if kind == "buffer":
            results["buffers"][name] = Comparison(relative_error(buffers[name], value), limit)
        elif kind == "grad":
            error = relative_error(parameters[name].grad, value)
            results["gradients"][name] = Comparison(error, gradient_limit(name, dtype))
        elif kind == "grad_norm" and not is_zero_gradient(name):
            error = relative_error(parameters[name].grad.double().norm(), value)
            results["gradient norms"][name] = Comparison(error, gradient_limit(name, dtype))
    compared = results["gradient norms"].keys() | {n for n in parameters if is_zero_gradient(n)}
    assert compared == parameters.keys(), f"gradients not compared: {sorted(parameters.keys() - compared)}"
    return results


def is_zero_gradient(name: str) -> bool:
    """Whether the exact gradient is 0: a covariance does not see the bias before it."""
    return name in ("reduce_shallow.bias", "reduce_latent.bias")


def compare_block(
    case: str,
    block_factory: Callable[..., nn.Module] = TransformerBlock,
    dtype: torch.dtype = torch.float64,
    mode: str = "eval",
    device: str = "cpu",
) -> Results:
    """Run one of `BLOCK_CASES` forward and backward and return every comparison.

    ``block_factory(dim, num_heads, drop_path=0.0)`` gives a block with the reference's state_dict.
    """
    with np.load(golden_file(f"{case}.npz")) as data:
        expected = {key: torch.from_numpy(np.asarray(data[key])) for key in data.files}
    if mode not in ("eval", "train"):
        raise ValueError(f"mode must be 'eval' or 'train', got {mode!r}")
    dim, heads = BLOCK_CASES[case]
    block = load_golden_weights(block_factory(dim, heads, drop_path=0.0)).to(device, dtype).train(mode == "train")
    x = expected["input"].to(device, dtype).requires_grad_()
    y = block(x)
    y.backward(expected["grad_output"].to(device, dtype))
    limit = OUTPUT_LIMIT[dtype]
    input_error = relative_error(x.grad, expected[f"{mode}.grad_input"])
    results: Results = {
        "outputs": {"output": Comparison(relative_error(y, expected[f"{mode}.output"]), limit)},
        "gradients": {"input": Comparison(input_error, GRADIENT_LIMIT[dtype])},
    }
    for name, parameter in block.named_parameters():
        error = relative_error(parameter.grad, expected[f"{mode}.grad.{name}"])
        results["gradients"][name] = Comparison(error, gradient_limit(name, dtype))
    if mode == "train":
        running = {k: v for k, v in block.named_buffers() if k.endswith(("running_mean", "running_var"))}
        results["buffers"] = {
            k: Comparison(relative_error(v, expected[f"train.buffer.{k}"]), limit) for k, v in running.items()
        }
    return results


FEATURES = (
    "patch_embed",
    "encoder_level1",
    "encoder_level2",
    "encoder_level3",
    "latent",
    "decoder_level3",
    "decoder_level2",
    "decoder_level1",
    "refinement",
)
OWN_GRADIENTS = (
    "patch_embed.proj.weight",
    "encoder_level1.0.attn.temperature",
    "encoder_level1.0.attn.gatedcnn.kernel_generator.3.weight",
    "latent.0.attn.temperature",
    "latent.0.attn.qkv_dwconv.weight",
    "decoder_level1.0.ffn.dwconv.weight",
    "refinement.0.attn.alpha_gated",
    "refinement.0.norm1.body.weight",
    "spd_proj_shallow.weight",
    "output.weight",
)


def write_own_case() -> Path:
    """Compute our own case with the fp64 reference and write it to tests/data, in the format of the released ones."""
    noise = np.random.RandomState(0)
    image, target = (torch.from_numpy(noise.random_sample((2, 3, 16, 24)).astype(np.float32)) for _ in range(2))
    data: dict[str, Tensor] = {"input": image, "target": target}
    model = load_golden_weights(mirage_mini(drop_path=0.0)).double()
    features: dict[str, Tensor] = {}
    for name, child in model.named_children():
        child.register_forward_hook(lambda _m, _i, out, name=name: features.__setitem__(name, out.detach()))
    prediction = model.eval()(image.double(), return_spd=True)
    data["eval.restored"] = prediction[0].float()
    data["eval.spd_loss_x0.01"] = 0.01 * MirageLoss("released")(prediction, target.double())[1].contrastive
    for name in FEATURES:
        data[f"eval.feature_checksum.{name}"] = checksum(features[name])
    data["eval.feature.latent"] = features["latent"].float()
    prediction = model.train()(image.double(), return_spd=True)
    total, terms = MirageLoss("released")(prediction, target.double())
    total.backward()
    data["train.restored"] = prediction[0].float()
    data["train.spd_loss_x0.01"] = 0.01 * terms.contrastive
    data.update({"train.l1": terms.l1, "train.fourier": terms.fourier, "train.total": total})
    for name, parameter in model.named_parameters():
        data[f"train.grad_norm.{name}"] = parameter.grad.norm()
        if name in OWN_GRADIENTS:
            data[f"train.grad.{name}"] = parameter.grad.float()
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            data[f"train.buffer.{name}"] = buffer.float()
    path = OWN_DATA / f"{OWN_CASE}.npz"
    np.savez_compressed(path, **{k: v.detach().numpy() for k, v in data.items()})
    return path


if __name__ == "__main__":
    print(write_own_case())
