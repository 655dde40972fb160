"""Configurations: files, overrides, what is refused and how, and the ones inside the package."""

from __future__ import annotations

import pytest
from click.testing import CliRunner
from train_cases import settings

from mirage.cli import main
from mirage.degradations import ELEVEN
from mirage.train import ConfigError, Run, build_loss, build_network, load_config
from mirage.train.config import as_dict, packaged, parse_overrides
from mirage.train.limits import check_numbers
from mirage.train.schedule import Rates

pytest.importorskip("yaml", reason="the extra [train] is not installed")

SETS = "data: {sets: [{clean: here, sigma: 25}]}\n"


def write(folder, text, name="config.yaml"):
    (folder / name).write_text(text)
    return folder / name


def test_overrides_are_yaml_and_reach_into_lists(tmp_path):
    path = write(tmp_path, SETS + "schedule: {steps: 5}\n")
    config = load_config(
        path,
        ["optimizer.lr=1e-3", "optimizer.betas=[0.9, 0.99]", "model.spd=false", "data.sets.0.clean=there",
         "trainer.ema=null", "model.arguments.dim=12"],
    )  # fmt: skip
    assert config.optimizer.lr == 1e-3 and config.optimizer.betas == [0.9, 0.99] and config.model.spd is False
    assert config.data.sets[0].clean == "there" and config.data.sets[0].sigma == 25
    assert config.trainer.ema is None and config.model.arguments == {"dim": 12}
    assert as_dict(config)["data"]["sets"][0]["clean"] == "there"


def test_included_files_lie_beneath(tmp_path):
    write(tmp_path, "optimizer: {lr: 1.0, clip: 2.0}\nseed: 3\n", "base.yaml")
    path = write(tmp_path, "include: base.yaml\noptimizer: {lr: 0.5}\nschedule: {steps: 5}\n" + SETS)
    config = load_config(path)
    assert (config.optimizer.lr, config.optimizer.clip, config.seed) == (0.5, 2.0, 3)
    write(tmp_path, "include: config.yaml\n", "base.yaml")
    with pytest.raises(ConfigError, match="includes itself"):
        load_config(path)
    with pytest.raises(ConfigError, match="include: no file at .*gone.yaml"):
        load_config(write(tmp_path, "include: [gone.yaml]\n"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimiser.lr=1", r"unknown key 'optimiser'; the nearest is 'optimizer'"),
        ("optimizer.learning_rate=1", r"unknown key 'optimizer.learning_rate'; the nearest is 'optimizer\.\w+'"),
        ("optimizer.lrr=1", r"unknown key 'optimizer.lrr'; the nearest is 'optimizer.lr'"),
        ("batch=4", r"unknown key 'batch'; the nearest is 'data.batch'"),
        ("data.sets.0.sigmas=4", r"unknown key 'data.sets\[0\].sigmas'; the nearest is 'data.sets\[0\].sigma'"),
        ("model.size=large", "model.size: expected tiny or small, got 'large'"),
        ("model.spd=1", "model.spd: expected bool, got 1"),
        ("data.batch=true", "data.batch: expected int, got True"),
        ("data.batch=2.5", "data.batch: expected int, got 2.5"),
        ("optimizer.lr=fast", "optimizer.lr: expected float, got 'fast'"),
        ("optimizer=3", "optimizer: expected a mapping"),
        ("optimizer.betas=[0.9]", "optimizer.betas: expected two numbers"),
        ("schedule.epochs=3", "schedule: expected steps or epochs, got steps=5, epochs=3"),
        ("schedule.decay_from=3", "decay_from belongs to schedule.kind=wsd"),
        ("data.crop=30", "data.crop: expected a positive multiple of 8, got 30"),
        ("data.sets=[]", "data.sets: expected at least one set"),
        ("data.sets.0.sigma=[50, 15]", r"data.sets\[0\].sigma: expected a number or a range \[low, high\]"),
        ("data.sets.0.sigma=null", r"data.sets\[0\]: expected degraded \(a folder\), sigma \(noise\) or rain"),
        ("data.sets.0.shards=a.tar", r"data.sets\[0\]: expected a folder \(clean\) or shards"),
        ("trainer.ema=1.0", "trainer.ema: expected a number between 0 and 1"),
        ("trainer.strategy=fsdp", "trainer.strategy: expected auto, ddp or one of its kinds .* got 'fsdp'"),
        ("output.keep=0", "output.keep: expected at least 1"),
        ("seed", "expected key=value, got 'seed'"),
        ("seed=[", "seed: not readable as YAML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, override, message):
    path = write(tmp_path, SETS + "schedule: {steps: 5}\n")
    with pytest.raises(ConfigError, match=message):
        load_config(path, [override])


def test_files_that_are_no_configuration(tmp_path):
    with pytest.raises(FileNotFoundError, match="the nearest packaged configuration is '3deg-tiny'"):
        load_config("3deg-tny")
    with pytest.raises(ConfigError, match="expected a mapping of keys to values, got list"):
        load_config(write(tmp_path, "- 1\n"))
    with pytest.raises(ConfigError, match="not readable as YAML"):
        load_config(write(tmp_path, "a: [\n"))
    assert parse_overrides(["a.b=1", "a.c=x"]) == {"a": {"b": 1, "c": "x"}}


def test_every_setting_is_there_in_both_sizes_and_presets():
    names = set(packaged())
    assert {f"{task}-{size}" for task in ("3deg", "5deg", "cdd11", "allweather") for size in ("tiny", "small")} < names
    assert {f"{task}-{size}-released" for task in ("3deg", "5deg", "cdd11") for size in ("tiny", "small")} < names


@pytest.mark.parametrize("name", sorted(packaged()))
def test_packaged_configurations_are_those_of_the_protocol(name):
    config = load_config(name)
    if name == "extractor-small":  # of mirage unirestorer extract, which has another network and loss
        assert len({one.name for one in config.data.sets}) == len(config.data.sets) == 31
        return
    if name == "unirestorer-router":  # of mirage unirestorer router, as UniRestorer trains it
        assert (config.data.crop, config.data.batch, config.optimizer.name, config.optimizer.lr) == (
            256,
            8,
            "adam",
            1e-3,
        )
        assert Rates(config.schedule, config.optimizer.lr, 1).at(40_000) == 1e-3
        return
    loss = build_loss(config)
    if name == "unirestorer-tiny":
        assert loss.contrastive_weight == loss.fourier_weight == 0 and config.optimizer.lr == 3e-4
        assert len(config.data.sets[0].kind) == 22 and config.data.sets[0].kind[:11] == list(ELEVEN)
        return
    if name in ("denoise-tiny", "denoise-derain-tiny", "descriptor-srresnet", "grids-tiny", "grids-restormer"):
        assert loss.contrastive_weight == loss.fourier_weight == 0
        return
    task, size, *released = name.split("-")
    assert config.model.size == size and config.data.crop == 128 and config.data.batch == 32
    assert config.optimizer.lr == 2e-4 and config.model.spd and config.model.drop_path == 0.1
    assert loss.fourier_weight == 0.1 and loss.temperature == 0.1
    assert len(config.data.sets) == {"3deg": 5, "5deg": 7, "cdd11": 11, "allweather": 1}[task]
    truncated = {one.noise for one in config.data.sets if one.sigma is not None}
    if released:
        assert (
            loss.contrastive_weight == 0.01 and config.optimizer.name == "adamw" and config.data.augment == "released"
        )
        assert config.schedule.epochs == {"3deg": 130, "5deg": 150, "cdd11": 130}[task]
        assert (
            config.schedule.by_epoch and config.schedule.warmup_epochs == 15 and config.schedule.horizon_epochs == 150
        )
        assert truncated == ({"truncated"} if "deg" in task else set())
    else:
        assert loss.contrastive_weight == 0.05 and config.optimizer.name == "adam" and config.data.augment == "flips"
        lengths = {"3deg": 120, "5deg": 130, "cdd11": 170}
        assert config.schedule.epochs == lengths.get(task)
        assert config.schedule.steps == (300_000 if task == "allweather" else None)
        assert truncated == ({"float"} if "deg" in task else set())


def test_the_sizes_are_the_released_models():
    for name, count in (("3deg-tiny", 6_207_412), ("3deg-small", 9_678_983)):
        network = build_network(load_config(name))
        assert sum(p.numel() for p in network.parameters() if p.requires_grad) == count


def test_arguments_that_the_network_refuses_are_errors_of_the_configuration(tmp_path):
    with pytest.raises(ConfigError, match="model: dim must be a positive multiple of 6"):
        build_network(settings(tmp_path, "model.arguments.dim=7"))
    with pytest.raises(ConfigError, match="model: .*unexpected keyword argument 'depth'"):
        build_network(settings(tmp_path, "model.arguments.depth=7"))
    with pytest.raises(ConfigError, match="sync_batchnorm"):
        build_network(settings(tmp_path, "trainer.sync_batchnorm=true"))


def test_the_command_lists_them_and_says_what_is_wrong():
    result = CliRunner().invoke(main, ["train", "configs"])
    assert result.exit_code == 0 and all(name in result.output for name in packaged())
    result = CliRunner().invoke(main, ["train", "3deg-tiny", "optimizer.lrr=1"])
    assert result.exit_code == 2 and "the nearest is 'optimizer.lr'" in result.output
    result = CliRunner().invoke(main, ["train", "nothing-like-it"])
    assert result.exit_code == 2 and "no configuration at 'nothing-like-it'" in result.output
    assert CliRunner().invoke(main, ["train", "--help"]).exit_code == 0


@pytest.mark.parametrize(
    ("override", "least"),
    [
        ("data.batch=0", 1), ("data.batch=-2", 1), ("data.workers=-1", 0), ("data.hold_out=-1", 0),
        ("data.cache=-.1", 0), ("schedule.steps=0", 1), ("trainer.accumulate=0", 1), ("trainer.threads=0", 1),
        ("trainer.nodes=0", 1),
        ("output.log_steps=0", 1), ("output.validate_steps=0", 1), ("output.checkpoint_steps=0", 1),
        ("optimizer.lr=-1e-4", 0), ("optimizer.lr=.nan", 0), ("optimizer.clip=-1.0", 0), ("seed=-1", 0),
    ],
)  # fmt: skip
def test_numbers_with_which_no_training_goes_on_are_refused(override, least, tmp_path):
    """Before anything is read or made: there are no pictures here."""
    config = load_config(write(tmp_path, SETS + "schedule: {steps: 5}\n"), [override])
    name = override.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"^{name}: expected at least {least}, got (nan|[-\d.e]+)$"):
        Run(config)


@pytest.mark.parametrize("name", packaged())
def test_numbers_of_packaged_configurations_can_be(name):
    check_numbers(load_config(name))
