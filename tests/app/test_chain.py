"""model.adapter.chain: exact resume, schedule and optimizer of a link, exports, commands, and refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import peft
import pytest
import timm
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import AutoModelForSequenceClassification

from app.callbacks import AdapterCheckpoint
from app.cli import main
from app.config.constructors import construct
from app.export.load_run import find_checkpoint, load_module
from app.run.checkpoint_io import read_checkpoint, saved_configuration
from app.run.spectrum_file import read_spectra
from modules.adapters import adapted_layers, adapted_projections
from modules.adapters.chain import link_name
from modules.adapters.init import init_factor
from modules.adapters.spectrum import singular_values
from modules.base import AdaptedModule
from modules.scaling import compilation
from modules.training.optimization import schedule_factor
from tests.app.export.test_peft import TASKS, logits
from tests.app.processes import run_on_two
from tests.app.test_resume import PowerCut, assert_same_end, cut_power
from tests.support.refusals import refused

if TYPE_CHECKING:
    from tests.app.conftest import CommandLine

# An epoch of 48 images has 8 steps with batches of 6.
CHAIN = "--model.adapter.chain.every_n_epochs=1"
FOUR = [CHAIN, "--trainer.max_epochs=4"]
A_TRAINED = ["--model.adapter.train=A", "--model.adapter.init_a=zero", "--model.adapter.init_b=orthogonal"]
BOTH = ["--model.adapter.train=both", "--model.adapter.init_a=kaiming"]
QUIET = ["--trainer.logger=false", "--trainer.limit_val_batches=0", "--checkpoint.monitor=null"]


def weights(module: Any) -> dict[str, Tensor]:
    return {name: layer.weight.detach().clone() for name, layer in adapted_layers(module.backbone).items()}


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """Collect the merged weights at the end of each fit."""
    collected: list[dict[str, Tensor]] = []
    monkeypatch.setattr(AdaptedModule, "on_train_end", lambda self: collected.append(weights(self)), raising=False)
    return collected


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Collect the state of a fit at the start of each batch: factors, learning rate, links and optimizer steps."""
    collected: list[dict[str, Any]] = []
    original = AdapterCheckpoint.on_train_batch_start

    def hook(self: AdapterCheckpoint, trainer: L.Trainer, module: Any, *args: Any) -> None:
        original(self, trainer, module, *args)
        optimizer = trainer.optimizers[0]
        named = [(group["name"].partition("/")[0], p) for group in optimizer.param_groups for p in group["params"]]
        states = {name: optimizer.state.get(p, {}).get("step", torch.tensor(0.0)) for name, p in named}
        factors = {name: (f.A.detach().clone(), f.B.detach().clone()) for name, (_, f) in projections(module)}
        row = {"factors": factors, "lr": optimizer.param_groups[0]["lr"], "links": len(module.chain.links)}
        collected.append(row | {"steps": {name: int(step) for name, step in states.items()}})

    monkeypatch.setattr(AdapterCheckpoint, "on_train_batch_start", hook)
    return collected


def projections(module: Any) -> Any:
    return adapted_projections(module.backbone).items()


def trained_module(path: Path) -> Any:
    """Return the model of a checkpoint with its links merged into the weights, as validate, test and predict do."""
    torch.manual_seed(0)
    L.seed_everything(0, verbose=False)
    checkpoint = read_checkpoint(path)
    module = construct(AdaptedModule, saved_configuration(checkpoint)["model"])
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
    return module.eval()


# -------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize(
    ("any_cli", "options", "cut", "saved"),
    [
        ("cli", [], 10, 9),  # within link 3
        pytest.param("cli", [], 8, 8, marks=pytest.mark.slow),  # between links 2 and 3
        pytest.param("cli", A_TRAINED, 10, 9, marks=pytest.mark.slow),
        pytest.param("cli", ["--model.backbone_dtype=bfloat16"], 10, 9, marks=pytest.mark.slow),
        pytest.param("text_cli", [*BOTH, "--model.adapter.chain.schedule=continue"], 10, 9, marks=pytest.mark.slow),
    ],
    indirect=["any_cli"],
)
def test_a_killed_chain_continues_bit_for_bit(
    any_cli: CommandLine, ends: list[dict[str, Tensor]], options: list[str], cut: int, saved: int
) -> None:
    options = [*FOUR, *options, "--trainer.limit_train_batches=4", "--checkpoint.last_every_n_steps=3"]
    assert any_cli("fit", *options) == 0
    with pytest.MonkeyPatch.context() as patch:
        cut_power(patch, cut)
        with pytest.raises(PowerCut):
            any_cli("fit", *options)
    assert any_cli.checkpoint(1)["global_step"] == saved
    assert any_cli("fit", *options, "--ckpt_path=last") == 0
    assert_same_end(any_cli, whole=0, resumed=1, trained="A" if A_TRAINED[0] in options else "B")
    uninterrupted, resumed = (any_cli.checkpoint(version)["chain"] for version in (0, 1))
    assert uninterrupted["start"] == resumed["start"] == 12
    assert len(uninterrupted["links"]) == len(resumed["links"]) == 3
    for expected, link in zip(uninterrupted["links"], resumed["links"], strict=True):
        assert expected.keys() == link.keys()
        assert all(torch.equal(tensor, link[name]) for name, tensor in expected.items())
    first, second = ends
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())


@pytest.mark.slow
def test_a_longer_run_merges_the_link_that_ended_the_shorter_run(
    cli: CommandLine, ends: list[dict[str, Tensor]]
) -> None:
    options = [CHAIN, *QUIET, "--trainer.limit_train_batches=2", "--model.schedule=constant", "--model.warmup_ratio=0"]
    assert cli("fit", *options, "--trainer.max_epochs=3") == 0
    assert cli("fit", *options, "--trainer.max_epochs=2") == 0
    assert len(cli.checkpoint(1)["chain"]["links"]) == 1
    assert cli("fit", *options, "--trainer.max_epochs=3", f"--ckpt_path={cli.run(1)}") == 0
    first, second = (cli.checkpoint(version) for version in (0, 1))
    assert all(torch.equal(tensor, second["state_dict"][name]) for name, tensor in first["state_dict"].items())
    assert all(torch.equal(weight, ends[2][name]) for name, weight in ends[0].items())


@pytest.mark.slow
def test_a_chain_continues_from_the_validation_at_the_end_of_a_link(
    cli: CommandLine, ends: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    """The best checkpoint is saved before the end of its epoch."""
    options = [*FOUR, "--trainer.limit_train_batches=2", "--trainer.logger=false"]
    assert cli("fit", *options, "--checkpoint.monitor=epoch", "--checkpoint.mode=min") == 0
    best = shutil.copy(cli.run() / "checkpoints" / "best.ckpt", tmp_path / "best.ckpt")
    assert cli.checkpoint(name="best")["global_step"] == 2
    assert cli("fit", *options, f"--ckpt_path={best}") == 0
    first, second = (cli.checkpoint(version) for version in (0, 1))
    assert first["chain"]["start"] == second["chain"]["start"] == 6
    assert all(torch.equal(tensor, second["state_dict"][name]) for name, tensor in first["state_dict"].items())
    assert all(torch.equal(weight, ends[1][name]) for name, weight in ends[0].items())


def test_validate_and_test_use_the_links_of_their_checkpoint(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best checkpoint is of an earlier link than the weights at the end of the fit."""
    seen: list[dict[str, Tensor]] = []
    original = AdaptedModule.on_test_epoch_end

    def collect(self: AdaptedModule) -> None:
        seen.append(weights(self))
        original(self)

    monkeypatch.setattr(AdaptedModule, "on_test_epoch_end", collect)
    first_is_best = ["--checkpoint.monitor=epoch", "--checkpoint.mode=min"]
    quick = ["--trainer.limit_train_batches=2", "--generalization.rows=0", "--trainer.logger=false"]
    assert cli("fit", *FOUR, *first_is_best, *quick, "--test_after_fit=true") == 0
    best, last = (cli.checkpoint(name=name) for name in ("best", "last"))
    assert "chain" not in best
    assert len(last["chain"]["links"]) == 3
    metrics_of_fit = cli.metrics()
    assert cli("test", f"--ckpt_path={cli.run()}") == 0
    assert cli.metrics()["test/loss"] == metrics_of_fit["test/loss"]
    assert cli("test", f"--ckpt_path={cli.run() / 'checkpoints' / 'last.ckpt'}") == 0
    pretrained = weights(trained_module(cli.run() / "checkpoints" / "best.ckpt"))
    merged = weights(trained_module(cli.run() / "checkpoints" / "last.ckpt"))
    for name, weight in pretrained.items():
        assert torch.equal(seen[0][name], weight)
        assert torch.equal(seen[1][name], weight)
        assert torch.equal(seen[2][name], merged[name])
        assert not torch.equal(merged[name], weight)
    assert cli("validate", f"--ckpt_path={cli.run() / 'checkpoints' / 'last.ckpt'}") == 0
    assert cli.metrics()["val/loss"] == metrics_of_fit["val/loss"]


@pytest.mark.slow
def test_other_pretrained_weights_are_refused(cli: CommandLine, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("fit", CHAIN, *QUIET) == 0
    code = cli("fit", CHAIN, *QUIET, "--seed_everything=1", "--trainer.max_epochs=3", f"--ckpt_path={cli.run()}")
    refused(capsys, code, "trained over other frozen weights")


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize(
    ("options", "frozen"), [([], 0), pytest.param(A_TRAINED, 1, marks=pytest.mark.slow)], ids=["B", "A"]
)
def test_a_link_has_one_frozen_factor_and_a_new_optimizer_state(
    cli: CommandLine, batches: list[dict[str, Any]], options: list[str], frozen: int
) -> None:
    assert cli("fit", *FOUR, *options, *QUIET, "--model.adapter.chain.every_n_epochs=2") == 0
    assert [row["links"] for row in batches] == [0] * 16 + [1] * 16
    side, trained = "AB"[frozen], "BA"[frozen]
    for row in batches:
        for name, factors in row["factors"].items():
            shape = torch.empty(32, 32, device="meta")
            start = init_factor("orthogonal", "AB"[frozen], shape, 4, 0, link_name(name, row["links"] + 1))  # type: ignore[arg-type]
            assert torch.equal(factors[frozen], start), (name, side)
    start_of_link = batches[16]
    assert all(not factors[1 - frozen].any() for factors in start_of_link["factors"].values())
    assert all(factors[1 - frozen].any() for factors in batches[15]["factors"].values())
    assert [row["steps"][trained] for row in batches] == [*range(16), *range(16)]
    assert [row["steps"]["head"] for row in batches] == list(range(32))


@pytest.mark.parametrize("schedule", ["restart", pytest.param("continue", marks=pytest.mark.slow)])
def test_the_schedule_restarts_with_a_link_or_continues(
    cli: CommandLine, batches: list[dict[str, Any]], schedule: str
) -> None:
    """An epoch of 8 batches has 3 optimizer steps, with 3 batches for a step. The last link has one epoch."""
    options = ["--trainer.max_epochs=3", "--trainer.accumulate_grad_batches=3", "--model.warmup_ratio=0.3"]
    chain = f"--model.adapter.chain={{every_n_epochs: 2, schedule: {schedule}}}"
    assert cli("fit", *options, chain, *QUIET, "--model.schedule=linear") == 0
    learning_rates = [batches[epoch * 8 + first]["lr"] for epoch in range(3) for first in (0, 3, 6)]
    links = ((0, 6), (6, 3)) if schedule == "restart" else ((0, 9),)
    expected = [0.01 * schedule_factor("linear", 0.3, steps)(i) for _, steps in links for i in range(steps)]
    assert learning_rates == pytest.approx(expected)


@pytest.mark.slow
def test_the_learning_rate_finder_merges_no_link(cli: CommandLine, batches: list[dict[str, Any]]) -> None:
    assert cli("fit", CHAIN, *QUIET, "--trainer.max_epochs=3", "--find_lr=true") == 0
    assert [row["links"] for row in batches[-24:]] == [0] * 8 + [1] * 8 + [2] * 8
    assert not any(row["links"] for row in batches[:-24])


@pytest.mark.slow
def test_a_new_link_does_not_recompile_the_blocks(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    graphs = []
    small = ["--model.backbone_args={patch_size: 8, embed_dim: 16, depth: 2, num_heads: 2}", "--model.compile=true"]
    for epochs in (1, 3):
        torch._dynamo.reset()
        counters.clear()
        limits = [f"--trainer.max_epochs={epochs}", "--trainer.limit_train_batches=2"]
        assert cli("fit", CHAIN, *QUIET, *small, *limits) == 0
        graphs.append(counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    assert graphs[0] == graphs[1] > 0
    assert len(cli.checkpoint(1)["chain"]["links"]) == 2


@pytest.mark.slow
def test_a_cached_prefix_does_not_change_a_chain(cli: CommandLine) -> None:
    fixed_inputs = ["--data.horizontal_flip=false", "--data.crop_scale=[1, 1]", "--model.adapter.layers=1"]
    fixed_inputs += ["--model.backbone_args={patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2}"]
    for cached in ("true", "false"):
        assert cli("fit", CHAIN, "--trainer.max_epochs=3", *QUIET, *fixed_inputs, f"--data.cache_prefix={cached}") == 0
    first, second = (cli.checkpoint(version) for version in (0, 1))
    assert len(first["chain"]["links"]) == 2
    assert all(torch.equal(tensor, second["state_dict"][name]) for name, tensor in first["state_dict"].items())


@pytest.mark.slow
def test_two_processes_train_the_same_chain_as_one(cli: CommandLine, tmp_path: Path) -> None:
    options = ["--data.horizontal_flip=false", "--data.crop_scale=[1, 1]", "--model.adapter.dropout=0", *FOUR, *QUIET]
    options += ["--model.backbone_args={patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2}"]
    run_on_two(cli.words("fit", *options, "--data.batch_size=3"), tmp_path)
    assert cli("fit", *options, "--data.batch_size=6") == 0
    first, second = (cli.checkpoint(version) for version in (0, 1))
    assert len(first["chain"]["links"]) == 3
    for name, tensor in first["state_dict"].items():
        torch.testing.assert_close(second["state_dict"][name], tensor, rtol=1e-3, atol=1e-5, msg=name)


# -------------------------------------------------------------------------------------------------- export and commands


@pytest.fixture(params=["cli", pytest.param("text_cli", marks=pytest.mark.slow)])
def chained(
    request: pytest.FixtureRequest, finished_fit: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> Iterator[CommandLine]:
    """Return a command line with a finished chain of 3 links of rank 4."""
    cli: CommandLine = request.getfixturevalue(request.param)
    finished_fit(cli, CHAIN, "--trainer.max_epochs=3", "--checkpoint.monitor=null")
    capsys.readouterr()
    return cli


def export(cli: CommandLine, form: str, output: Path, *options: str) -> int:
    return main(["export", str(cli.run()), "--format", form, "--output", str(output), *options])


@torch.no_grad()
def test_exports_have_the_logits_of_the_trained_model(chained: CommandLine, tmp_path: Path) -> None:
    name = "text_cli" if chained.backbone else "cli"
    module = trained_module(find_checkpoint(str(chained.run())))
    assert len(module.chain.links) == 2
    expected = logits(name, module)
    with module.pretrained():
        frozen = logits(name, module)
    assert (expected - frozen).abs().max() > 1e-3
    flat = load_module(find_checkpoint(str(chained.run())), {})
    torch.testing.assert_close(logits(name, flat), expected, atol=1e-5, rtol=1e-5)
    assert {f.A.shape[0] for _, f in adapted_projections(flat.backbone).values()} == {12}
    make_base, logits_of = TASKS[name]
    for form in ("peft", "merged", "compact"):
        assert export(chained, form, tmp_path / form) == 0
    for folder in (tmp_path / "peft", chained.run() / "adapter"):
        config = json.loads((folder / "adapter_config.json").read_text())
        fused = 2 if name == "cli" else 1  # Query and value are one layer.
        assert (config["r"], config["lora_alpha"] / config["r"]) == (12 * fused, 4)
        base = make_base(flat, Path(chained.backbone[1]) if chained.backbone else Path()).eval()
        model = peft.PeftModel.from_pretrained(base, folder).eval()
        torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-5)
    if name == "cli":
        merged: Any = timm.create_model(f"local-dir:{tmp_path / 'merged'}", pretrained=True).eval()
    else:
        merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits_of(merged), expected, atol=1e-5, rtol=1e-5)
    card = (tmp_path / "peft" / "README.md").read_text()
    assert "| Chain | `3 links of rank 4, A orthogonal, B zero at the start of each` |" in card


@pytest.mark.slow
def test_an_exported_chain_has_the_test_loss_of_the_run(chained: CommandLine, tmp_path: Path) -> None:
    options = ["--data.test_on_validation=true"] if chained.backbone else []
    assert chained("test", *options, f"--ckpt_path={chained.run()}") == 0
    expected = chained.metrics()["test/loss"]
    for number, form in enumerate(("peft", "compact"), start=1):
        assert export(chained, form, tmp_path / form) == 0
        assert chained("test", CHAIN, *options, f"--model.adapter_path={tmp_path / form}") == 0
        assert chained.metrics(number)["test/loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_links_whose_ranks_exceed_the_weight_are_decomposed(cli: CommandLine, tmp_path: Path) -> None:
    """9 links of rank 4 exceed the 32 inputs of the layers."""
    nine = ["--trainer.max_epochs=9", "--trainer.limit_train_batches=2"]
    assert cli("fit", CHAIN, *QUIET, *nine) == 0
    checkpoint = cli.run() / "checkpoints" / "last.ckpt"
    expected, flat = logits("cli", trained_module(checkpoint)), load_module(checkpoint, {})
    assert {f.A.shape[0] for _, f in adapted_projections(flat.backbone).values()} == {32}
    torch.testing.assert_close(logits("cli", flat), expected, atol=1e-5, rtol=1e-5)
    torch.manual_seed(0)
    base = TASKS["cli"][0](flat, Path())
    model = peft.PeftModel.from_pretrained(base, cli.run() / "adapter").eval()
    torch.testing.assert_close(logits("cli", model), expected, atol=1e-5, rtol=1e-5)


def test_spectra_are_of_the_current_link_and_of_the_sum(cli: CommandLine, finished_fit: Callable[..., None]) -> None:
    finished_fit(cli, CHAIN, "--trainer.max_epochs=3", "--checkpoint.monitor=null")
    rows = {
        (row["step"], row["projection"], row["factor"]): row for row in read_spectra(cli.run() / "spectrum.parquet")
    }
    flat = load_module(cli.run() / "checkpoints" / "last.ckpt", {})
    link = trained_module(cli.run() / "checkpoints" / "last.ckpt")
    links = dict(adapted_projections(link.backbone))
    for name, (layer, factors) in adapted_projections(flat.backbone).items():
        total = factors.B.detach().double() @ factors.A.detach().double()
        sums, current = rows[24, name, "sum"], rows[24, name, "BA"]
        sigma = torch.linalg.svdvals(total)[:12].float()
        torch.testing.assert_close(torch.tensor(sums["singular_values"]), sigma, rtol=1e-3, atol=1e-5)
        norm = layer.weight.detach()[factors.projection.rows].norm()
        assert sums["relative_norm"] == pytest.approx(float(factors.scale * total.norm() / norm), rel=1e-4)
        _, last = links[name]
        assert len(current["singular_values"]) == 4
        expected = torch.linalg.svdvals((last.B @ last.A).detach())[:4]
        torch.testing.assert_close(torch.tensor(current["singular_values"]), expected, rtol=1e-3, atol=1e-5)
        frozen = rows[24, name, "A"]["singular_values"]
        assert frozen == pytest.approx(singular_values(last.A.detach()).tolist())
        assert (8, name, "sum") not in rows
        assert (16, name, "sum") in rows
    assert set(cli.scalars("spectrum/sum/largest")) == {16, 24}
    assert set(cli.scalars("spectrum/BA/largest")) == {0, 8, 16, 24}


@pytest.mark.slow
def test_commands_use_the_stacked_links(
    cli: CommandLine, finished_fit: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Chains of one seed and one length share the stacked A."""
    finished_fit(cli, CHAIN, "--trainer.max_epochs=3", "--checkpoint.monitor=null")
    other = ["--trainer.max_epochs=3", "--checkpoint.monitor=null", "--model.learning_rate=0.005", *QUIET[:2]]
    assert cli("fit", CHAIN, *other) == 0
    runs = [str(cli.run(version)) for version in (0, 1)]
    for command in ("spectrum", "similarity"):
        capsys.readouterr()
        assert main([command, *runs, "--output", str(tmp_path / command)]) == 0
        assert "is a chain. The factors of its 3 links are stacked." in capsys.readouterr().err
    assert main(["combine", *runs, "--weights", "0.5,0.5", "--output", str(tmp_path / "combined")]) == 0
    assert "sum of B over one A" in capsys.readouterr().out
    assert json.loads((tmp_path / "combined" / "adapter_config.json").read_text())["r"] == 24
    bank = str(tmp_path / "bank")
    assert main(["export", *runs, "--format", "bank", "--output", bank, "--names", "a,b"]) == 0
    assert main(["bank", "unpack", bank, "--output", str(tmp_path / "unpacked")]) == 0
    export(cli, "peft", tmp_path / "peft")
    files = [folder / "adapter_model.safetensors" for folder in (tmp_path / "peft", tmp_path / "unpacked" / "a")]
    assert files[0].read_bytes() == files[1].read_bytes()
    capsys.readouterr()
    assert main(["runs", str(cli.root), "--json"]) == 0
    assert {row["variant"] for row in json.loads(capsys.readouterr().out)} == {"B-chain"}
    capsys.readouterr()
    assert export(cli, "peft", tmp_path / "small", "--rank", "2") == 0
    assert "Truncated from rank 12 to 2" in capsys.readouterr().out
    sizes = [cli.metrics(version)["adapter/bytes"] for version in (0, 1)]
    assert sizes == [3 * 4 * 2 * 4 * 32 * 4] * 2  # 3 links, 4 projections, two factors of 4 × 32 float32


@pytest.mark.slow
def test_theory_measures_the_first_link(cli: CommandLine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [word for word in cli.words("theory", CHAIN, "--output", str(tmp_path / "page")) if word]
    assert main(command) == 0
    err = capsys.readouterr().err
    assert "the measurement is of the first link" in err
    assert "is merged" not in err


@pytest.mark.slow
def test_forgetting_begins_with_the_pretrained_weights(cli: CommandLine, parquet_path: Path) -> None:
    options = [CHAIN, *QUIET, f"--forgetting.path={parquet_path}", "--forgetting.rows=40"]
    assert cli("fit", *options) == 0
    assert cli("fit", *options, "--trainer.max_epochs=3", f"--ckpt_path={cli.run()}") == 0
    before = [cli.metrics()[key] for key in cli.metrics() if key.startswith("forgetting/before/")]
    assert cli("fit", *options, "--trainer.max_epochs=1") == 0
    fresh = [cli.metrics(1)[key] for key in cli.metrics(1) if key.startswith("forgetting/before/")]
    assert before == fresh != []


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.adapter.chain.every_n_epochs=0"], "chain.every_n_epochs: 0 must be a whole number, 1 or more"),
        (["--model.adapter.chain.schedule=cosine"], "chain.schedule"),
        ([CHAIN, "--model.shard_frozen=true"], "model.shard_frozen: the links of model.adapter.chain cannot be merged"),
        ([CHAIN, "--trainer.callbacks+=EMAWeightAveraging"], "averages would mix the factors of different links"),
        (
            [CHAIN, "--trainer.callbacks+=app.callbacks.adapter_averaging.AdapterAveraging"],
            "averages would mix the factors of different links",
        ),
        ([CHAIN, "--model.adapter.init_a=given", "--model.adapter.init_b=given"], "the next link has no initialiser"),
    ],
)
def test_options_that_a_chain_excludes_are_refused_at_the_start(
    cli: CommandLine, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    refused(capsys, cli("fit", *options), message)
    assert not (cli.run() / "checkpoints" / "last.ckpt").exists()


@pytest.mark.parametrize("option", ["--model.adapter.alpha=99", "--model.adapter.alpha_pattern={query: 99}"])
def test_merged_links_keep_their_scale(chained: CommandLine, capsys: pytest.CaptureFixture[str], option: str) -> None:
    last = f"--ckpt_path={chained.run() / 'checkpoints/last.ckpt'}"
    before = Path(last.partition("=")[2]).read_bytes()
    for command in ("fit", "validate"):
        code = chained(command, CHAIN, last, option, "--trainer.max_epochs=9")
        refused(capsys, code, "model.adapter.alpha", "merged links with the scale")
    assert Path(last.partition("=")[2]).read_bytes() == before


def test_only_fit_refuses_a_chain_over_a_loaded_adapter(
    fitted_cli: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    path = f"--model.adapter_path={fitted_cli.run() / 'adapter'}"
    refused(capsys, fitted_cli("fit", CHAIN, path), "model.adapter.chain", "model.adapter_path")
    assert fitted_cli("validate", CHAIN, path) == 0


def test_a_checkpoint_with_a_damaged_chain_is_refused(
    cli: CommandLine, finished_fit: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    finished_fit(cli, CHAIN, "--trainer.max_epochs=3", "--checkpoint.monitor=null")
    content = cli.checkpoint()
    output = f"--output={tmp_path / 'out'}"
    for number, chain in enumerate((3, {"links": [3], "start": 0}, content["chain"] | {"links": [{}]})):
        path = cli.run() / "checkpoints" / f"{number}.ckpt"  # The run directory has the seed of the backbone.
        torch.save(content | {"chain": chain}, path)
        for command in (["spectrum", str(path), output], ["export", str(path), "--format=peft", output]):
            refused(capsys, main(command), "chain")
        refused(capsys, cli("validate", f"--ckpt_path={path}"), "chain")
        refused(capsys, cli("fit", f"--ckpt_path={path}", "--trainer.max_epochs=4"), "chain")


def test_links_are_not_merged_into_sharded_weights(
    cli: CommandLine, finished_fit: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    finished_fit(cli, CHAIN, "--trainer.max_epochs=3", "--checkpoint.monitor=null")
    options = [
        "--model.adapter={chain: {every_n_epochs: null}}",
        "--model.shard_frozen=true",
        f"--ckpt_path={cli.run()}",
    ]
    refused(capsys, cli("validate", *options), "model.shard_frozen: the checkpoint is of a chain")


def test_null_on_the_command_line_turns_off_the_chain_of_a_recipe(cli: CommandLine, tmp_path: Path) -> None:
    overlay = tmp_path / "chain.yaml"
    overlay.write_text("model: {init_args: {adapter: {chain: {every_n_epochs: 2}}}}")
    options = [f"--config={overlay}", *QUIET, "--trainer.max_epochs=3", "--trainer.limit_train_batches=1"]
    assert cli("fit", *options) == 0
    assert cli("fit", *options, "--model.adapter={chain: {every_n_epochs: null}}") == 0
    assert len(cli.checkpoint(0)["chain"]["links"]) == 1
    assert "chain" not in cli.checkpoint(1)


def test_a_chain_is_ignored_without_adapters(cli: CommandLine) -> None:
    assert cli("fit", CHAIN, *QUIET, "--model.tuning=head", "--trainer.callbacks+=EMAWeightAveraging") == 0
    assert "chain" not in cli.checkpoint()


def test_rounding_to_bfloat16_is_reported(cli: CommandLine, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--model.backbone_dtype=bfloat16", "--model.learning_rate=0.0001"]
    assert cli("fit", CHAIN, *QUIET, *small, "--trainer.limit_train_batches=2") == 0
    assert "rounding the merged weights to bfloat16 changed the update of link 1 by" in capsys.readouterr().err
