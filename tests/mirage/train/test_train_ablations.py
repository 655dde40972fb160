"""Ablations of Tables 7 and C: what is left out, our counts beside the printed ones, and that all of them train."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from train_cases import SMALL, settings, write_pictures

import mirage
from mirage.blocks import Attention
from mirage.cli import main
from mirage.train import ABLATIONS, ConfigError, Run, build_loss, build_network
from mirage.train.ablations import PartialMixer, ablate, find_ablation

for _module in ("lightning_fabric", "yaml", "PIL"):
    pytest.importorskip(_module, reason="the extra [train] is not installed")


def test_the_whole_mixer_is_the_references():
    torch.manual_seed(0)
    reference, mixer = Attention(12, 2, 0.0).double(), PartialMixer(12, 2, 0.0).double()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    mixer.load_state_dict(reference.state_dict())
    x = torch.randn(2, 12, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), reference(x), rtol=1e-12, atol=1e-12)
    assert [name for name, _ in mixer.named_parameters()] == [name for name, _ in reference.named_parameters()]


@pytest.mark.parametrize(
    ("branches", "fusion"),
    [(("att",), False), (("att", "conv"), True), (("conv", "mlp"), False), (("att", "mlp"), True)],
)
def test_a_mixer_of_some_branches_is_their_concatenation(branches, fusion):
    """Each branch by itself, on its share of the channels, from the reference's modules."""
    torch.manual_seed(0)
    mixer = PartialMixer(12, 2, 0.0, branches, fusion).double().eval()
    x = torch.randn(2, 12, 8, 8, dtype=torch.float64)
    parts = dict(zip(branches, x.chunk(len(branches), 1), strict=True))
    found = {}
    for name, part in parts.items():
        if name == "att":
            found[name] = Attention.channel_attention(mixer, part)
        elif name == "conv":
            found[name] = mixer.gatedcnn(part)
        else:
            found[name] = mixer.mlp(part.flatten(2)).reshape(part.shape)
    if fusion:
        a, b = branches
        found = {a: found[a] + torch.sigmoid(found[b]), b: found[b] + torch.sigmoid(found[a])}  # alphas begin at 1
    torch.testing.assert_close(mixer(x), mixer.project_out(torch.cat(list(found.values()), 1)), rtol=1e-12, atol=1e-12)


def test_the_table_has_the_printed_rows_and_our_counts():
    result = CliRunner().invoke(main, ["train", "ablations", "--json"])
    assert result.exit_code == 0, result.output
    rows = {row["name"]: row for row in json.loads(result.output)}
    printed = {name: (row["printed"], row["psnr"], row["ssim"]) for name, row in rows.items()}
    assert printed == {
        "att_only": (19.89, 32.23, 0.912), "no_dynamic_conv": (9.43, 32.21, 0.911), "no_mlp": (7.01, 32.39, 0.913),
        "no_fusion": (5.71, 32.57, 0.914), "no_contrast": (5.80, 32.63, 0.916), "euclidean": (6.10, 32.53, 0.914),
        "no_fourier": (5.80, 32.70, 0.917), "": (6.21, 32.77, 0.919),
    }  # fmt: skip
    full = rows[""]["parameters"]
    assert full == 6_207_412 and rows["no_fourier"]["parameters"] == full
    blocks = 35
    assert full - rows["no_fusion"]["parameters"] == 3 * blocks
    assert full - rows["no_contrast"]["parameters"] == 300 + 2328 + 144 * 64 + 64 + 576 * 64 + 64
    assert full - rows["euclidean"]["parameters"] == (144 - 12) * 64 + (576 - 24) * 64
    generators = sum(p.numel() for name, p in mirage.mirage_tiny().named_parameters() if "kernel_generator" in name)
    kernels = sum(49 * m.qkv.in_channels for m in mirage.mirage_tiny().modules() if isinstance(m, Attention))
    assert full - rows["no_dynamic_conv"]["parameters"] == generators - kernels
    far = {name for name, row in rows.items() if abs(row["parameters"] / 1e6 - row["printed"]) > 0.005}
    assert far == {name for name, row in rows.items() if row["note"]} == set(ABLATIONS)
    table = CliRunner().invoke(main, ["train", "ablations"]).output
    assert "w/o DynamicConv" in table and "19.89" in table and "4.59" in table


@pytest.mark.parametrize("name", ABLATIONS)
def test_each_of_them_trains_and_the_fast_modules_agree_with_the_reference(tmp_path, name):
    write_pictures(tmp_path / "clean")
    losses = []
    for fast in ("false", "true"):
        run = Run(settings(tmp_path, f"model.ablation={name}", f"model.fast={fast}", "schedule.steps=4", out=fast))
        run.train()
        text = (tmp_path / fast / "train.csv").read_text().splitlines()[1:]
        losses.append([float(line.split(",")[1]) for line in text])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3) and len(losses[0]) == 4
    contrast = run.loss.contrastive_weight
    assert (contrast == 0) == (name == "no_contrast") and (run.loss.fourier_weight == 0) == (name == "no_fourier")


def test_euclidean_embeddings_are_of_the_means():
    network = ablate(mirage.mirage_tiny(**SMALL), find_ablation("euclidean")).eval()
    shallow, latent = torch.rand(2, 6, 8, 8), torch.rand(2, 24, 2, 2)
    z_s, z_l = network.spd_head(shallow, latent)
    expected = torch.nn.functional.normalize(network.spd_proj_shallow(network.reduce_shallow(shallow).mean((2, 3))))
    torch.testing.assert_close(z_s, expected)
    assert z_l.shape == (2, 8)


def test_a_name_that_is_none(tmp_path):
    with pytest.raises(ConfigError, match="model.ablation: expected one of att_only, .*got 'no_conv'; the nearest is"):
        build_network(settings(tmp_path, "model.ablation=no_conv"))
    with pytest.raises(ConfigError, match="euclidean needs model.spd=true"):
        build_network(settings(tmp_path, "model.ablation=euclidean", "model.spd=false"))
    assert build_loss(settings(tmp_path, "model.ablation=no_fourier", "loss.fourier_weight=0.3")).fourier_weight == 0
