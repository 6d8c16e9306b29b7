"""Built-in variants: their keys, their precedence among recipe, command line and checkpoint, and their messages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import get_loader

from app.cli import main
from app.config.variants import VARIANTS, VariantError, command_line_options, split_variant, variant_keys
from modules.adapters import AdapterConfig
from tests.app.conftest import CommandLine
from tests.app.test_resume import PowerCut, cut_power

# a recipe that sets all keys of an adapter variant, mostly to other values
OTHER_RECIPE = {
    "tuning": "adapter",
    "lr_ratio_b": 3.0,
    "adapter": {
        "train": "A",
        "init_a": "zero",
        "init_b": "signs",
        "scaling": "rslora",
        "rank": 3,
        "targets": ["value"],
    },
}
TRAINED = {"B": {"B"}, "A": {"A"}, "lora": {"A", "B"}, "lora-fa": {"B"}, "rslora": {"A", "B"}, "lora+": {"A", "B"}}


def model_keys(cli: CommandLine, version: int = 0) -> dict[str, Any]:
    config = yaml.safe_load((cli.run(version) / "config.yaml").read_text())
    return config["model"]["init_args"]


def value_at(tree: Mapping[str, Any], key: str) -> Any:
    for part in key.removeprefix("model.").split("."):
        tree = tree[part]
    return tree


def fit(cli: CommandLine, *words: str) -> int:
    return cli("fit", "--trainer.max_steps=1", "--trainer.limit_val_batches=1", *words)


def test_unknown_names_are_refused_with_a_suggestion() -> None:
    with pytest.raises(VariantError, match=r"'LORA' is not known; did you mean lora\? Choose one of B, A, lora, "):
        variant_keys("LORA")
    with pytest.raises(VariantError, match=r"'xyz' is not known\. Choose"):
        variant_keys("xyz")


def test_variant_keys_returns_a_copy() -> None:
    variant_keys("ia3")["model.adapter.targets"].append("query")
    assert variant_keys("ia3")["model.adapter.targets"] == ["key", "value", "mlp_out"]


def test_values_become_options_that_the_parser_reads_back() -> None:
    keys = {"a.b": "zero", "c": None, "d": True, "e": [1, "x"], "f": 1e-5, "g": {"h": 2}}
    words = command_line_options(keys)
    load = get_loader("yaml")
    assert [load(word.partition("=")[2]) for word in words] == ["zero", None, True, [1, "x"], 1e-5, {"h": 2}]
    assert [word.partition("=")[0] for word in words] == [f"--{key}" for key in keys]


def test_the_option_is_removed_from_the_arguments() -> None:
    assert split_variant(["fit"], ["--a", "1", "--variant", "A", "--variant=B"]) == ("B", ["--a", "1"])
    assert split_variant(["test"], ["--a"]) == (None, ["--a"])


@pytest.mark.parametrize("variant", TRAINED)
def test_a_variant_overrides_any_recipe(cli: CommandLine, tmp_path: Path, variant: str) -> None:
    recipe = tmp_path / "other.yaml"
    recipe.write_text(yaml.safe_dump({"model": OTHER_RECIPE}))
    assert fit(cli, "--config", str(recipe), "--variant", variant) == 0
    saved = model_keys(cli)
    assert {key: value_at(saved, key) for key in VARIANTS[variant]} == dict(VARIANTS[variant])
    assert (saved["adapter"]["rank"], saved["adapter"]["targets"]) == (3, ["value"])  # from the recipe
    # the optimizer holds groups of the trained factors alone
    checkpoint = cli.checkpoint()
    groups = {g["name"]: g for g in checkpoint["optimizer_states"][0]["param_groups"]}
    assert {name for name in groups if name in ("A", "B")} == TRAINED[variant]
    if variant == "lora+":
        assert groups["B"]["initial_lr"] == pytest.approx(16 * groups["A"]["initial_lr"])
    scale = AdapterConfig(**saved["adapter"]).scale
    assert scale == pytest.approx(16 / (3**0.5 if variant == "rslora" else 3))


def test_variants_head_and_full_have_no_adapters(cli: CommandLine, tmp_path: Path) -> None:
    recipe = tmp_path / "other.yaml"
    recipe.write_text(yaml.safe_dump({"model": {"backbone_dtype": "bfloat16", "shard_frozen": True}}))
    for version, variant in enumerate(("head", "full")):
        assert fit(cli, "--config", str(recipe), "--variant", variant) == 0
        names = cli.checkpoint(version)["state_dict"]
        assert not any(".adapters." in name for name in names)
        assert any("blocks.0" in name for name in names) == (variant == "full")


def test_the_command_line_overrides_the_variant_and_the_variant_overrides_the_recipe(cli: CommandLine) -> None:
    assert fit(cli, "--model.adapter.init_a=gaussian", "--variant=B", "--model.adapter.rank", "2") == 0
    adapter = model_keys(cli)["adapter"]
    assert (adapter["train"], adapter["init_a"], adapter["rank"]) == ("B", "gaussian", 2)


def test_resume_of_the_same_variant(cli: CommandLine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "other.yaml"
    recipe.write_text(yaml.safe_dump({"model": {"adapter": {"train": "B", "rank": 2}}}))
    words = ("--config", str(recipe), "--variant=A", "--model.adapter.init_b=gaussian", "--model.adapter.rank=4")
    assert cli("fit", *words, "--trainer.max_epochs=1") == 0
    drawn = cli.checkpoint()["state_dict"]
    capsys.readouterr()
    assert cli("fit", *words[:-1], "--trainer.max_epochs=2", "--ckpt_path=last") == 0
    log = capsys.readouterr().err
    assert "model.adapter.rank: 4 from the checkpoint; the configuration file has 2." in log
    assert "model.adapter.train:" not in log  # the variant overrides the file, as in the first fit
    resumed = cli.checkpoint()
    assert resumed["epoch"] == 1 and not cli.run(1).exists()
    frozen = [name for name in drawn if name.endswith(".B")]
    assert frozen and all(torch.equal(drawn[name], resumed["state_dict"][name]) for name in frozen)


def test_a_variant_that_differs_from_the_checkpoint_is_refused(
    fitted_cli: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    before = fitted_cli.checkpoint()
    assert fitted_cli("fit", "--variant=lora-fa", "--ckpt_path=last") == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "not of the variant lora-fa" in message
    assert "model.adapter.init_a: orthogonal (the variant has kaiming)" in message
    assert "model.adapter.train:" not in message  # B in checkpoint and variant
    assert fitted_cli.checkpoint()["global_step"] == before["global_step"]
    assert fitted_cli("fit", "--variant=B", "--ckpt_path=last", "--trainer.max_epochs=2") == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fit", "--variant", "lroa"], "--variant: 'lroa' is not known; did you mean lora?"),
        (["fit", "--variant"], "--variant: a name is missing. Choose one of B, A"),
        (["test", "--variant=B"], "--variant: only fit takes a variant"),
        (["--variant=B", "fit"], "--variant: only fit takes a variant"),
    ],
)
def test_bad_use_is_one_message(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--config", "tests/conf/image.yaml"]) == 2
    error = capsys.readouterr().err.strip()
    assert expected in error and "\n" not in error and "Traceback" not in error


def test_help_names_the_variants(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--variant NAME" in text and all(name in text for name in VARIANTS)
    assert main(["test", "--help"]) == 0
    assert "--variant" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------ PEFT's methods


@pytest.mark.parametrize(
    ("variant", "family"),
    [
        pytest.param("adalora", "cli", marks=pytest.mark.slow),
        pytest.param("adalora", "text_cli", marks=pytest.mark.slow),
        pytest.param("adalora", "summary_cli", marks=pytest.mark.slow),
        pytest.param("adalora", "instruction_cli", marks=pytest.mark.slow),
        pytest.param("ia3", "text_cli", marks=pytest.mark.slow),  # IA³ has no state besides its vectors
        pytest.param("ia3", "summary_cli", marks=pytest.mark.slow),
        pytest.param("ia3", "instruction_cli", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_of_pefts_methods_equals_an_uninterrupted_run(
    request: pytest.FixtureRequest, family: str, variant: str
) -> None:
    cli: CommandLine = request.getfixturevalue(family)
    words = (f"--variant={variant}", "--checkpoint.last_every_n_steps=3", "--trainer.limit_val_batches=1")
    options = [*words, "--trainer.limit_train_batches=6", "--model.adapter.dropout=0"]
    assert cli("fit", *options) == 0
    with pytest.MonkeyPatch.context() as patch:
        cut_power(patch, 4)  # of 12 steps, while AdaLoRA prunes
        with pytest.raises(PowerCut):
            cli("fit", *options)
    assert cli.checkpoint(1)["global_step"] == 3
    assert cli("fit", *options, "--ckpt_path=last") == 0
    whole, resumed = cli.checkpoint(0), cli.checkpoint(1)
    assert whole["global_step"] == resumed["global_step"] == 12
    assert whole["state_dict"].keys() == resumed["state_dict"].keys()
    assert all(torch.equal(tensor, resumed["state_dict"][name]) for name, tensor in whole["state_dict"].items())
    marks = {"adalora": ("lora_A", "lora_B", "lora_E"), "ia3": ("ia3_l",)}[variant]
    assert all(any(mark in name for name in whole["state_dict"]) for mark in marks)
    if variant == "adalora":
        assert whole["adalora"]["rank_pattern"] == resumed["adalora"]["rank_pattern"] != {}
    metrics = cli.metrics(1)
    assert metrics["adapter/bytes"] > 0
    assert {k: v for k, v in cli.metrics(0).items() if k.startswith("val/")}.items() <= metrics.items()
    assert cli("validate", "--trainer.limit_val_batches=1", "--ckpt_path", str(cli.run(1))) == 0


def test_export_of_pefts_methods_is_refused(
    cli: CommandLine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(cli, "--variant=ia3") == 0
    for form in ("merged", "peft", "compact"):
        capsys.readouterr()
        assert main(["export", str(cli.run()), "--format", form, "--output", str(tmp_path / form)]) == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "tuning: ia3" in errors[0] and not (tmp_path / form).exists()
