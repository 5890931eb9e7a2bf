"""Run configurations: what is accepted, what is refused and how the refusal reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from scenarios.config import RunConfig, load, parse, unflatten
from tracer.errors import BadConfig, NotFound


def test_an_empty_configuration_is_all_defaults() -> None:
    assert load(None) == RunConfig()


@pytest.mark.parametrize("defaults", ["plain", "mlx-lm", "peft", "trl", "unsloth"])
def test_flattening_loses_nothing(defaults: str) -> None:
    config = parse(
        {"defaults": defaults, "lora": {"rank": 4, "targets": ["q_proj"]}, "clip": {"mode": "value", "value": 1}}
    )
    assert parse(unflatten(config.flat())) == config


def test_a_file_its_overrides_and_a_model_are_laid_over_each_other(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[lora]\nrank = 4\n[optimizer]\nlr = 1e-4\nname = "sgd"\n')
    config = load(file, ["optimizer.lr=1e-3", "optimizer.name=adam", "lora.layers=2"], model="tiny-gemma3-64")
    assert (config.lora.rank, config.optimizer.lr, config.optimizer.name) == (4, 1e-3, "adam")
    assert (config.lora.layers, config.model.name) == (2, "tiny-gemma3-64")


def test_the_defaults_of_mlx_lm_are_its_own() -> None:
    config = parse({"defaults": "mlx-lm"})
    assert (config.lora.layers, config.lora.alpha / config.lora.rank, config.lora.targets) == (16, 20.0, "linear")
    assert (config.optimizer.name, config.optimizer.bias_correction, config.clip.mode) == ("adam", False, "none")


def test_the_scale_of_mlx_lm_stays_at_20_whatever_the_rank() -> None:
    assert parse({"defaults": "mlx-lm", "lora": {"rank": 4}}).lora.alpha == 80.0


def test_the_defaults_of_peft_are_its_own() -> None:
    config = parse({"defaults": "peft", "data": {"rows": 100}})
    assert (config.lora.targets, config.lora.alpha, config.clip.mode) == (("q_proj", "v_proj"), 8.0, "norm")
    assert config.train.steps == 39  # three epochs of 100 rows, 8 at a time


def test_the_defaults_of_trl_are_pefts_but_for_its_own() -> None:
    config = parse({"defaults": "trl", "optimizer": {"warmup": 3}})
    assert (config.optimizer.lr, config.optimizer.warmup, config.optimizer.schedule) == (2e-5, 3, "linear")
    assert (config.train.autocast, config.train.checkpointing, config.lora.rank) == ("library", "library", 8)


def test_a_scale_that_is_given_holds_whatever_alpha_and_rank_are() -> None:
    assert parse({"lora": {"rank": 4, "alpha": 8, "scale": 20}}).lora.effective_scale == 20.0
    assert parse({"lora": {"rank": 4, "alpha": 8}}).lora.effective_scale == 2.0


def test_what_a_path_starts_from_gives_way_to_what_is_given(tmp_path: Path) -> None:
    base = {"data": {"batching": "library", "rows": 4}}
    config = load(None, ["data.rows=6"], base=base)
    assert (config.data.batching, config.data.rows) == ("library", 6)
    file = tmp_path / "run.toml"
    file.write_text('[data]\nbatching = "plain"\n')
    assert load(file, base=base).data.batching == "plain"


def test_the_mlx_lm_defaults_are_those_of_the_installed_library() -> None:
    lora = pytest.importorskip("mlx_lm.lora", reason="needs the extra `mlx`")
    config, theirs = parse({"defaults": "mlx-lm"}), lora.CONFIG_DEFAULTS
    assert config.lora.layers == theirs["num_layers"]
    assert config.lora.alpha / config.lora.rank == theirs["lora_parameters"]["scale"]
    assert (config.lora.rank, config.lora.dropout) == tuple(theirs["lora_parameters"][k] for k in ("rank", "dropout"))
    assert (config.train.steps, config.train.batch, config.train.seed) == (
        theirs["iters"],
        theirs["batch_size"],
        theirs["seed"],
    )
    assert (config.optimizer.name, config.optimizer.lr) == (theirs["optimizer"], theirs["learning_rate"])


BAD = {
    "lora.rnk=3": ("lora.rnk", "did you mean rank"),
    "lora.rank=0": ("lora.rank = 0", "a whole number from 1"),
    "lora.rank=true": ("lora.rank = true", "a whole number from 1"),
    "lora.rank=8.0": ("lora.rank = 8.0", "a whole number from 1"),
    "lora.layers=some": ('lora.layers = "some"', '"all" or a whole number from 1'),
    "lora.targets=[]": ("lora.targets = []", '"linear" or a list'),
    "lora.dropout=1": ("lora.dropout = 1", "below 1"),
    "optimizer.name=muon": ('optimizer.name = "muon"', '"adamw", "adam", "sgd"'),
    "optimizer.lr=nan": ("optimizer.lr = NaN", "a number from 0"),
    "optimizer.betas=[0.9]": ("optimizer.betas = [0.9]", "a list of 2 items"),
    "clip.value=0": ("clip.value = 0", "a number above 0"),
    "train.compile=1": ("train.compile = 1", '"default", true, false'),
    "train.seed_at=later": ('train.seed_at = "later"', '"before-load", "after-load"'),
    "data.mask_label=[1]": ("data.mask_label = [1]", "a list of 2 items"),
    "trian.steps=3": ("[trian]", "did you mean train"),
    "defaults=axolotl": ('defaults = "axolotl"', '"plain", "mlx-lm", "peft", "trl", "unsloth"'),
    "lora.scale=0": ("lora.scale = 0", '"alpha/rank" or a number above 0'),
    "parts.loss=torch": ('parts.loss = "torch"', '"path", "mlx", "mlx-lm", "unsloth-mlx"'),
    "steps": ("--set steps", "section.key=value"),
}


@pytest.mark.parametrize("override", BAD)
def test_a_bad_setting_is_refused_with_its_place_and_what_is_allowed(override: str) -> None:
    with pytest.raises(BadConfig) as error:
        load(None, [override])
    place, allowed = BAD[override]
    assert place in error.value.line()
    assert allowed in error.value.line()


def test_a_file_that_is_no_toml_and_one_that_is_not_there_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[lora\n")
    with pytest.raises(BadConfig, match="not a readable TOML file"):
        load(file)
    with pytest.raises(NotFound, match=r"absent\.toml does not exist"):
        load(tmp_path / "absent.toml")
