"""What extractors see of an image; the small network; CLIP's tower under DA-CLIP's names; GRIDS' descriptor."""

import json

import pytest
import torch
import torch.nn.functional as F

from mirage.checkpoint import CheckpointError
from mirage.degradations import create
from mirage.grids import SRResNetDescriptor
from mirage.networks import create as create_network
from mirage.unirestorer import (
    CLIPExtractor,
    Extractor,
    GridsExtractor,
    SmallExtractor,
    load_extractor,
    save_extractor,
    views,
)
from mirage.unirestorer.clip_tower import MEAN, STD
from mirage.whole_files import write_whole


def seeded(seed=0):
    torch.manual_seed(seed)


def picture(height, width, seed=0):
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(seed))


# --- views


def test_crops_are_the_middle_and_the_corners_each_once():
    images = picture(40, 50)
    seen = views(images, "crops", 32)
    assert seen.shape == (2, 5, 3, 32, 32)
    expected = [images[:, :, y : y + 32, x : x + 32] for y, x in ((4, 9), (0, 0), (0, 18), (8, 0), (8, 18))]
    assert torch.equal(seen, torch.stack(expected, 1))
    assert views(images, "crops", 40).shape == (2, 3, 3, 40, 40)
    assert torch.equal(views(images, "crops", 64), images[:, None])
    assert views(images, "crops", 64, enlarge=True).shape == (2, 3, 3, 64, 64)


def test_resize_is_pillows_bicubic_and_its_middle():
    image = pytest.importorskip("PIL.Image", reason="the extra [images] is not installed")
    pixels = (F.interpolate(picture(9, 14), (54, 84), mode="bilinear") * 255).round()[:1]
    seen = views(pixels / 255, "resize", 24)
    assert seen.shape == (1, 1, 3, 24, 24)
    whole = image.fromarray(pixels[0].byte().permute(1, 2, 0).contiguous().numpy())
    side = int(24 * 84 / 54)
    resized = torch.tensor(list(whole.resize((side, 24), image.Resampling.BICUBIC).tobytes())).reshape(24, side, 3)
    left = round((side - 24) / 2)
    expected = resized[:, left : left + 24].permute(2, 0, 1)
    assert (seen[0, 0] * 255 - expected).abs().max() < 1.1  # Pillow rounds to 8 bits after each direction
    assert views(pixels / 255, "resize", 54).shape[-2:] == (54, 54)
    assert views(picture(7, 5), "resize", 20).shape == (2, 1, 3, 20, 20)


def test_views_refuse_what_they_do_not_know():
    with pytest.raises(ValueError, match=r"got torch.float32 \[3, 8, 8\]"):
        views(torch.zeros(3, 8, 8), "crops", 4)
    with pytest.raises(ValueError, match="got torch.uint8"):
        views(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "crops", 4)
    for make in (SmallExtractor, CLIPExtractor, lambda view: views(picture(8, 8), view, 4)):
        with pytest.raises(ValueError, match="view: expected resize or crops, got 'whole'"):
            make(view="whole")


# --- the small network


def small(**options):
    seeded()
    extractor = SmallExtractor(4, 16, **{"size": 16, **options})
    for module in extractor.modules():  # statistics as after a training
        if isinstance(module, (torch.nn.BatchNorm2d, torch.nn.BatchNorm1d)):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return extractor.eval()


def test_the_small_network_is_small_and_sees_the_finest_texture():
    extractor = SmallExtractor()
    assert 2e5 < sum(p.numel() for p in extractor.parameters()) < 5e5
    first, second = (layer for layer in extractor.stages[0] if isinstance(layer, torch.nn.Conv2d))
    assert first.stride == second.stride == (1, 1)
    assert isinstance(extractor, Extractor) and extractor.dim == 128


def test_small_embeddings_are_means_over_crops_whatever_the_batch():
    extractor = small()
    images = picture(20, 24)
    found = extractor.train().embed(images)
    assert extractor.training  # left as it was, though it was not used
    extractor.eval()
    crops = views(images, "crops", 16)
    expected = torch.stack([extractor(crops[:, n]) for n in range(5)]).mean(0)
    torch.testing.assert_close(found, expected.detach())
    torch.testing.assert_close(extractor(crops[:, 0]).norm(dim=1), torch.full((2,), 4.0))
    torch.testing.assert_close(extractor.embed(images[1:]), found[1:])
    assert not found.requires_grad and found.dtype == torch.float32
    noisy, _ = create("GN", sigma=50)(images, 0)
    assert (extractor.embed(noisy) - found).norm() > 1e-2
    assert small(view="resize").embed(images).shape == (2, 16)
    with pytest.raises(ValueError, match="sides of at least 8"):
        extractor.embed(picture(7, 30))


def test_a_small_extractor_survives_its_file(tmp_path):
    extractor = small()
    path = tmp_path / "extractor.safetensors"
    save_extractor(extractor, path)
    found = load_extractor(path)
    assert isinstance(found, SmallExtractor) and found.size == 16 and not found.training
    images = picture(12, 12)
    assert torch.equal(found.embed(images), extractor.embed(images))
    assert found.fingerprint == extractor.fingerprint != load_extractor(path, size=20).fingerprint
    assert load_extractor(path, view="resize").view == "resize"
    content = path.read_bytes()
    for _ in range(8):  # safetensors puts metadata in an order of chance
        save_extractor(extractor, path)
        assert path.read_bytes() == content
    save_extractor(extractor, path, dtype=torch.float16)
    half = load_extractor(path)
    assert half.fingerprint != extractor.fingerprint and half.head[0].weight.dtype == torch.float32
    torch.testing.assert_close(half.embed(images), extractor.embed(images), rtol=0, atol=2e-2)


def test_files_that_are_no_extractor(tmp_path):
    from safetensors.torch import save

    with pytest.raises(FileNotFoundError, match="no packaged weights"):
        load_extractor("no-such-extractor")
    with pytest.raises(FileNotFoundError, match="no file"):
        load_extractor(tmp_path / "no.safetensors")
    path = tmp_path / "other.safetensors"
    path.write_bytes(b"text")
    with pytest.raises(ValueError, match="not readable"):
        load_extractor(path)
    write_whole(path, save({"a": torch.zeros(1)}))
    with pytest.raises(ValueError, match="of format 1, got None"):
        load_extractor(path)
    content = {"format": 1, "kind": "small", "arguments": {"width": 4, "dim": 16}}
    write_whole(path, save({"a": torch.zeros(1)}, {"mirage_extractor": json.dumps(content)}))
    with pytest.raises(ValueError, match="Missing key"):
        load_extractor(path)
    with pytest.raises(ValueError, match=r"ends in \.safetensors"):
        save_extractor(small(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match="SmallExtractor, CLIPExtractor, GridsExtractor, got Linear"):
        save_extractor(torch.nn.Linear(1, 1), path)
    large = small()
    with torch.no_grad():
        large.head[0].weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"head.0.weight: holds values that are not finite as torch.float16"):
        save_extractor(large, path, dtype=torch.float16)


# --- CLIP's tower

WIDTH, LAYERS, PATCH, SIDE, DIM = 128, 2, 4, 3, 10


def released(prefix="visual_control.", inner="transformer.transformer."):
    """A shrunken tower under DA-CLIP's names: random float64."""
    shapes = {
        "class_embedding": (WIDTH,),
        "positional_embedding": (SIDE**2 + 1, WIDTH),
        "proj": (WIDTH, DIM),
        "conv1.weight": (WIDTH, 3, PATCH, PATCH),
    }
    for norm in ("ln_pre", "ln_post"):
        shapes |= {f"{norm}.weight": (WIDTH,), f"{norm}.bias": (WIDTH,)}
    for n in range(LAYERS):
        block = f"{inner}resblocks.{n}."
        shapes |= {
            f"{block}attn.in_proj_weight": (3 * WIDTH, WIDTH),
            f"{block}attn.in_proj_bias": (3 * WIDTH,),
            f"{block}attn.out_proj.weight": (WIDTH, WIDTH),
            f"{block}attn.out_proj.bias": (WIDTH,),
            f"{block}mlp.c_fc.weight": (4 * WIDTH, WIDTH),
            f"{block}mlp.c_fc.bias": (4 * WIDTH,),
            f"{block}mlp.c_proj.weight": (WIDTH, 4 * WIDTH),
            f"{block}mlp.c_proj.bias": (WIDTH,),
        }
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{block}{norm}.weight": (WIDTH,), f"{block}{norm}.bias": (WIDTH,)}
    random = torch.Generator().manual_seed(3)
    state = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=random, dtype=torch.float64) / (shape[-1] ** 0.5 if len(shape) > 1 else 5)
        state[prefix + name] = value + 1 if "ln_" in name and name.endswith("weight") else value
    return state


def by_hand(state, images):
    """The tower written out, in float64, from CLIP's names; two heads of 64 features."""

    def norm(x, name):
        return F.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    mean, std = (torch.tensor(values).double()[:, None, None] for values in (MEAN, STD))
    x = F.conv2d((images - mean) / std, state["conv1.weight"], stride=PATCH).flatten(2).mT
    x = torch.cat([state["class_embedding"].expand(len(x), 1, WIDTH), x], 1) + state["positional_embedding"]
    x = norm(x, "ln_pre")
    for n in range(LAYERS):
        block = f"transformer.transformer.resblocks.{n}"
        qkv = norm(x, f"{block}.ln_1") @ state[f"{block}.attn.in_proj_weight"].mT + state[f"{block}.attn.in_proj_bias"]
        q, k, v = (part.unflatten(-1, (2, 64)).transpose(1, 2) for part in qkv.chunk(3, -1))
        mixed = ((q @ k.mT / 8).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + mixed @ state[f"{block}.attn.out_proj.weight"].mT + state[f"{block}.attn.out_proj.bias"]
        hidden = norm(x, f"{block}.ln_2") @ state[f"{block}.mlp.c_fc.weight"].mT + state[f"{block}.mlp.c_fc.bias"]
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        x = x + hidden @ state[f"{block}.mlp.c_proj.weight"].mT + state[f"{block}.mlp.c_proj.bias"]
    return norm(x[:, 0], "ln_post") @ state["proj"]


def test_vit_b_32_has_its_number_of_parameters():
    with torch.device("meta"):
        tower = CLIPExtractor()
    assert sum(p.numel() for p in tower.parameters()) == 87_849_216
    assert tower.dim == 512 and tower.size == 224 and tower.blocks[0].self_attn.num_heads == 12


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_the_tower_of_a_file_computes_what_clip_does(tmp_path, suffix):
    state = released()
    path = tmp_path / f"daclip{suffix}"
    others = {"logit_scale": torch.ones(1), "visual.conv1.weight": torch.zeros(1),
              "visual_control.transformer.zero_modules.0.weight": torch.zeros(2, 2)}  # fmt: skip
    if suffix == ".pt":
        torch.save({"epoch": 3, "state_dict": {f"module.{name}": v for name, v in (state | others).items()}}, path)
    else:
        from safetensors.torch import save_file

        save_file(state | others, path)
    tower = load_extractor(f"clip:{path}")
    assert isinstance(tower, CLIPExtractor) and isinstance(tower, Extractor)
    assert (tower.size, tower.dim, tower.view, len(tower.blocks)) == (12, DIM, "resize", LAYERS)
    state = {name.removeprefix("visual_control."): value.float().double() for name, value in state.items()}
    images = picture(12, 12).double()
    expected = by_hand(state, images)
    torch.testing.assert_close(tower.double()(images), expected, rtol=0, atol=1e-10)
    found = tower.float().embed(images.float())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)
    assert expected.norm(dim=1).min() > 1.5  # not normalised
    assert tower.embed(picture(9, 31)).shape == (2, DIM)
    save_extractor(tower, tmp_path / "saved.safetensors")
    again = load_extractor(tmp_path / "saved.safetensors")
    assert again.fingerprint == tower.fingerprint and torch.equal(again.embed(images.float()), found)
    crops = load_extractor(f"clip:{path}", view="crops")
    assert crops.fingerprint != tower.fingerprint
    corners = crops(views(picture(12, 20), "crops", 12).flatten(0, 1)).unflatten(0, (2, 3)).mean(1)
    torch.testing.assert_close(crops.embed(picture(12, 20)), corners.detach())


def test_the_tower_agrees_with_open_clip():
    transformer = pytest.importorskip("open_clip.transformer", reason="open_clip_torch is not installed")
    seeded()
    theirs = transformer.VisionTransformer(12, PATCH, WIDTH, LAYERS, 2, 4.0, output_dim=DIM).eval()
    from mirage.unirestorer.clip_tower import _translated

    ours = CLIPExtractor(WIDTH, LAYERS, patch=PATCH, size=12, dim=DIM).eval()
    ours.load_state_dict(_translated(theirs.state_dict()))
    images = picture(12, 12)
    normal = (images - ours.mean) / ours.std
    torch.testing.assert_close(ours(images), theirs(normal), rtol=0, atol=2e-6)


def test_clips_own_tower_and_files_without_one(tmp_path):
    path = tmp_path / "clip.pt"
    torch.save(released("visual.", "transformer."), path)
    assert CLIPExtractor.from_weights(path, prefix="visual.").dim == DIM
    with pytest.raises(CheckpointError, match=r"expected weights named visual_control\.\*, got visual.class_embedding"):
        CLIPExtractor.from_weights(path)
    state = released()
    del state["visual_control.ln_post.bias"]
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"ln_post.bias"):
        CLIPExtractor.from_weights(path)
    torch.save({"visual_control.proj": torch.zeros(4, 2)}, path)
    with pytest.raises(CheckpointError, match="no image tower of CLIP under visual_control"):
        CLIPExtractor.from_weights(path)
    with pytest.raises(FileNotFoundError, match="no file"):
        CLIPExtractor.from_weights(tmp_path / "no.pt")
    with pytest.raises(ValueError, match="multiples of patch 32 and heads 12, got 200"):
        CLIPExtractor(size=200)
    torch.save(released(), path)
    with pytest.raises(CheckpointError, match="size: expected 12, as its positions are, got 224"):
        load_extractor(f"clip:{path}", size=224)
    with pytest.raises(ValueError, match=r"got \[2, 3, 8, 8\]"):
        CLIPExtractor(64, 1, patch=4, size=12, dim=3)(picture(8, 8))


# --- GRIDS' descriptor


def test_grids_features_become_means_and_spreads(tmp_path):
    seeded()
    network = create_network("srresnet", dim=4, num_blocks=1, upscale=2)
    extractor = GridsExtractor(SRResNetDescriptor(network), size=16)
    assert isinstance(extractor, Extractor) and extractor.dim == 8
    images = picture(16, 16)
    features = SRResNetDescriptor(network).features(images).reshape(2, 4, -1)
    expected = torch.cat([features.mean(2), features.std(2, correction=0).square().add(1e-8).log() / 2], 1)
    torch.testing.assert_close(extractor.embed(images), expected)
    assert extractor.embed(picture(20, 30)).shape == (2, 8)

    from mirage.networks import save

    path = tmp_path / "srresnet.safetensors"
    save(network, path)
    found = load_extractor(f"grids:{path}")
    assert isinstance(found, GridsExtractor) and found.size == 32
    assert found.fingerprint != extractor.fingerprint
    torch.testing.assert_close(found.embed(images), expected)
    save_extractor(extractor, path)
    assert load_extractor(path).fingerprint == extractor.fingerprint
