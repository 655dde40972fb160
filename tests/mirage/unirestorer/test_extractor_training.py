"""Labels told apart: the loss and its targets, retrieval, the training and its commands."""

import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from mirage.train import ConfigError, load_config
from mirage.unirestorer import load_extractor, save_extractor
from mirage.unirestorer.contrast import contrastive_loss, contrastive_targets, label_relations
from mirage.unirestorer.extract_command import extract as extract_command
from mirage.unirestorer.extract_command import retrieval as retrieval_command
from mirage.unirestorer.extractor_training import ExtractorRun
from mirage.unirestorer.retrieval import embed_all, labelled_images, measure_retrieval

for module in ("lightning_fabric", "yaml", "PIL"):
    pytest.importorskip(module, reason="the extra [train] is not installed")

LABELS = ("noise/small", "noise/large", "blur", "clean")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder with eight smooth pictures."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(8):
        coarse = torch.from_numpy(rng.random((1, 3, 9, 9), dtype=np.float32))
        image = torch.nn.functional.interpolate(coarse, (48, 48), mode="bilinear")[0]
        image[:, :, ::7] *= 0.3
        pixels = (image * 255).byte().permute(1, 2, 0).contiguous().numpy()
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def config(pictures, folder, *more):
    path = folder / "extractor.yaml"
    kinds = (
        "{kind: GN, sigma: [20, 30]}",
        "{kind: GN, sigma: [80, 100]}",
        "{kind: GB, sigma: 3}",
        "{kind: GN, sigma: 0}",
    )
    sets = "\n".join(f"    - {{name: {n}, clean: ., kind: {k}}}" for n, k in zip(LABELS, kinds, strict=True))
    path.write_text(
        "model: {arguments: {width: 4, dim: 8}}\noptimizer: {lr: 5e-3}\nschedule: {steps: 60}\n"
        f"data:\n  root: {pictures}\n  crop: 32\n  validation_crop: 32\n  batch: 16\n  hold_out: 3\n  sets:\n{sets}\n"
        f"output: {{folder: {folder / 'run'}, log_steps: 30, validate_steps: 60, checkpoint_minutes: null}}\n"
    )
    return load_config(path, more)


# --- the loss


def test_equal_labels_share_the_probability_and_related_ones_get_a_part():
    relations = label_relations(LABELS, 0.5)
    assert relations.tolist() == [[1, 0.5, 0, 0], [0.5, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    targets = contrastive_targets(torch.tensor([0, 0, 1, 2, 0]), relations)
    expected = (
        torch.tensor([[0, 2, 1, 0, 2], [2, 0, 1, 0, 2], [5 / 3, 5 / 3, 0, 0, 5 / 3], [0] * 5, [2, 2, 1, 0, 0]]) / 5
    )
    torch.testing.assert_close(targets, expected)
    with pytest.raises(ValueError, match="related: expected 0 to 1, got 2"):
        label_relations(LABELS, 2)


def test_the_loss_is_the_cross_entropy_of_cosines():
    torch.manual_seed(0)
    z = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    targets = contrastive_targets(torch.tensor([0, 0, 1, 2, 0]), label_relations(LABELS, 0.5))
    found = contrastive_loss(z, targets, 0.2)
    unit = (z / z.norm(dim=1, keepdim=True)).detach()
    terms = []
    for row in (0, 1, 2, 4):  # row 3 has no other of its type
        logits = {other: float(unit[row] @ unit[other]) / 0.2 for other in range(5) if other != row}
        total = math.log(sum(math.exp(value) for value in logits.values()))
        terms.append(sum(float(targets[row, other]) * (total - value) for other, value in logits.items()))
    assert float(found.detach()) == pytest.approx(sum(terms) / 4, rel=1e-5)
    found.backward()
    assert bool(torch.isfinite(z.grad).all()) and z.grad[0].norm() > 0
    alone = contrastive_loss(
        torch.randn(2, 3), contrastive_targets(torch.tensor([0, 3]), label_relations(LABELS, 0)), 1
    )
    assert float(alone) == 0


def test_retrieval_looks_at_other_pictures_alone():
    labels = ["noise/small", "noise/small", "noise/large", "blur", "blur", "noise/large"]
    pictures = ["a", "b", "a", "a", "b", "b"]
    angles = torch.tensor([0.0, 0.2, 0.1, 2.0, 2.05, 0.19])
    found = measure_retrieval(torch.stack([angles.cos(), angles.sin()], 1) * 5, labels, pictures)
    # 0 -> 5 (large), 1 -> 2 (large), 2 -> 5, 3 -> 4, 4 -> 3, 5 -> 2
    assert found.type == 1 and found.label == pytest.approx(4 / 6)
    assert found.by_label == {"noise/small": 0, "noise/large": 1, "blur": 1}
    assert found.confused["noise/small"] == "noise/large"
    with pytest.raises(ValueError, match="two different ones"):
        measure_retrieval(torch.zeros(2, 2), ["a", "b"], ["x", "x"])
    with pytest.raises(ValueError, match="got 2, 1, 2"):
        measure_retrieval(torch.zeros(2, 2), ["a"], ["x", "y"])


# --- the training


def test_a_training_goes_on_where_it_stopped_and_tells_noise_from_blur(pictures, tmp_path):
    torch.manual_seed(0)
    whole = ExtractorRun(config(pictures, tmp_path, f"output.folder={tmp_path / 'whole'}"))
    assert whole.labels == LABELS and len(whole.validation) == 12
    crops = labelled_images(pictures, whole.config.data, 8, 48)
    targets = contrastive_targets(torch.tensor([LABELS.index(label) for label in crops.labels]), whole.loss)

    def measured():
        embeddings = embed_all(whole.extractor, crops.images)
        return contrastive_loss(embeddings, targets, 0.1), measure_retrieval(embeddings, crops.labels, crops.pictures)

    loss, found = measured()
    whole.train()
    less, better = measured()
    assert less < 0.8 * loss and better.label > found.label
    validated = whole.validate()
    assert validated["label"] <= validated["type"] <= 1

    half = ExtractorRun(config(pictures, tmp_path, "schedule.horizon_epochs=48", "schedule.steps=20"))
    half.train()
    rest = ExtractorRun(config(pictures, tmp_path))
    assert rest.step == 20 and rest.resumed is not None
    rest.train()
    assert rest.extractor.fingerprint == whole.extractor.fingerprint != half.extractor.fingerprint
    sample = rest.data[3]
    assert sample.degraded.shape == (3, 16, 16) and rest.labels[int(sample.clean)] == sample.name
    with pytest.raises(Exception, match="not of an extractor of"):
        ExtractorRun(config(pictures, tmp_path, "model.arguments.width=5"))


def test_what_cannot_train(pictures, tmp_path):
    for settings, message in (
        ({"margin": 16}, "margin: expected 0 to less than half of data.crop 32, got 16"),
        ({"temperature": 0.0}, "temperature: expected a positive number, got 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            ExtractorRun(config(pictures, tmp_path), **settings)
    with pytest.raises(ConfigError, match="model.arguments: expected width and dim"):
        ExtractorRun(config(pictures, tmp_path, "model.arguments.heads=3"))
    one = [f"data.sets.{n}.name=noise" for n in range(4)]
    with pytest.raises(ConfigError, match="two or more different names, got noise"):
        ExtractorRun(config(pictures, tmp_path, *one))


def test_the_commands(pictures, tmp_path):
    config(pictures, tmp_path)
    path = tmp_path / "extractor.yaml"
    out = tmp_path / "small.safetensors"
    arguments = ["--config", str(path), "--margin", "8", "-o", str(out), "schedule.steps=2", "data.hold_out=0"]
    arguments += ["--card", str(tmp_path / "card.md"), "--data", "eight drawings"]
    done = CliRunner().invoke(extract_command, arguments)
    assert done.exit_code == 0, done.output
    assert "4 labels" in done.output and out.is_file()
    card = (tmp_path / "card.md").read_text()
    assert (
        card.startswith("# small.safetensors\n") and "| data | eight drawings |" in card and "| steps | 2 of 16" in card
    )
    assert "noise/large: GN (sigma [80, 100])" in card and "the middle 16 x 16 seen" in card
    found = load_extractor(out)
    assert found.size == 16 and found.dim == 8

    arguments = [str(pictures), "--extractor", str(out), "--config", str(path), "--count", "3", "--size", "32"]
    done = CliRunner().invoke(retrieval_command, [*arguments, "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert "12 crops: type" in done.output and "noise/small" in done.output
    crops = labelled_images(pictures, load_config(path).data, 3, 32)
    assert crops.types[:6] == ("noise",) * 6 and len(set(crops.pictures)) == 3
    torch.testing.assert_close(embed_all(found, crops.images, 5), embed_all(found, crops.images, 12))
    other = tmp_path / "again.safetensors"
    save_extractor(found, other)
    assert load_extractor(other).fingerprint == found.fingerprint

    done = CliRunner().invoke(extract_command, ["--config", str(path), "-o", "a.pth"])
    assert done.exit_code == 2 and "ends in .safetensors" in done.output
    done = CliRunner().invoke(retrieval_command, [str(tmp_path / "no"), "--extractor", str(out), "--config", str(path)])
    assert done.exit_code == 1 and "no" in done.output
