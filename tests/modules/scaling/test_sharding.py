"""Two ranks with sharded frozen weights compute the same as one process, and as two ranks with full copies."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset, Subset

from datamodules.base import ResumableDataModule
from datamodules.errors import ModelError
from datamodules.loading.batching import Draw
from modules.adapters import AdapterConfig, adapter_state, merge
from modules.generation.decoding import Decoding
from modules.language_modeling import LanguageModel
from modules.scaling.sharding import FrozenShards, sharded_stacks
from tests.causal_backbones import save_decoder
from tests.support.refusals import refuses
from tests.support.trainers import quiet_trainer, stub_trainer

TRAIN, VAL, TEST, PREDICT = 16, 5, 9, 7  # in batches of 2 on 2 ranks, all numbers but the first are uneven


class Rows(Dataset[tuple[int, Tensor]]):
    def __init__(self, lengths: list[int], generator: torch.Generator) -> None:
        self.tokens = [torch.randint(3, 250, (length,), generator=generator) for length in lengths]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, key: int | Draw) -> tuple[int, Tensor]:
        index = key[0] if isinstance(key, tuple) else key
        return index, self.tokens[index]


class Sequences(ResumableDataModule):
    """Random tokens of random lengths. With `choices`, evaluation is multiple choice with shared prefixes."""

    def __init__(self, batch_size: int, choices: bool = False) -> None:
        super().__init__(batch_size, num_workers=0)
        generator = torch.Generator().manual_seed(1)
        lengths = torch.randint(4, 12, (TEST,), generator=generator).tolist()
        # training rows have one length, so that the mean over ranks is the mean over tokens
        self.learnt, self.rows = (Rows(lengths, generator) for lengths in ([8] * TRAIN, lengths))
        self.choices = choices

    def _batch(self, rows: list[tuple[int, Tensor]], left: bool = False) -> dict[str, Tensor]:
        ids = [row.flip(0) if left else row for _, row in rows]
        padded = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=2)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        batch = {"input_ids": padded, "attention_mask": mask}
        if left:
            batch = {key: value.flip(1) for key, value in batch.items()}
        batch["labels"] = batch["input_ids"].where(batch["attention_mask"] > 0, -100)
        return {**batch, "index": torch.tensor([i for i, _ in rows])}

    def _choices(self, rows: list[tuple[int, Tensor]]) -> dict[str, Any]:
        batch = self._batch(rows)
        subject = rows[0][0] // 4  # ranks may have different numbers of batches for the same prefix
        return {
            "prefix": torch.arange(10, 14 + subject),
            "input_ids": batch["input_ids"],
            "lengths": batch["attention_mask"].sum(1),
            "choices": torch.tensor([5, 6, 7]),
            "answers": batch["index"] % 3,
            "subject": f"subject {subject}",
            "index": batch["index"],
        }

    def train_dataloader(self) -> DataLoader[Any]:
        return self.train_loader(self.learnt, collate=self._batch)

    def _evaluation(self, size: int) -> DataLoader[Any]:
        collate = self._choices if self.choices else self._batch
        return self.evaluation_loader(Subset(self.rows, range(size)), collate=collate)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._evaluation(VAL)

    def test_dataloader(self) -> DataLoader[Any]:
        return self._evaluation(TEST)

    def predict_dataloader(self) -> DataLoader[Any]:
        if self.choices:
            return self._evaluation(TEST)
        return self.evaluation_loader(
            Subset(self.rows, range(PREDICT)), collate=lambda rows: self._batch(rows, left=True)
        )


def language_model(backbone: Path, shard: bool, **keys: Any) -> LanguageModel:
    adapter = AdapterConfig(rank=2, targets=["all"])
    keys = {"backbone_dtype": "float32", "adapter": adapter, "generation": Decoding(max_new_tokens=6), **keys}
    model = LanguageModel(str(backbone), learning_rate=1e-2, **keys)
    model.shard_frozen = shard
    # many end tokens give responses of different lengths
    model.backbone.generation_config.eos_token_id = list(range(3, 70))
    return model


def trainer(world: int, folder: Path, **keys: Any) -> L.Trainer:
    keys = {"accumulate_grad_batches": 2, "strategy": "ddp" if world > 1 else "auto", **keys}
    return quiet_trainer(devices=world, use_distributed_sampler=False, default_root_dir=folder, **keys)


Fitted = tuple[LanguageModel, L.Trainer, dict[str, float]]


def fitted(world: int, shard: bool, backbone: Path, folder: Path, **keys: Any) -> Fitted:
    """Fit for one epoch with validation. Return the model, its trainer and the metrics."""
    folder.mkdir(exist_ok=True)
    model, runner = language_model(backbone, shard, **keys), trainer(world, folder)
    runner.fit(model, datamodule=Sequences(4 // world))
    assert (model.shards is not None) is (shard and world > 1)
    runner.save_checkpoint(folder / "fitted.ckpt")
    return model, runner, {k: v.item() for k, v in runner.callback_metrics.items() if k.startswith("val/")}


def everything(world: int, backbone: Path, folder: Path) -> dict[str, Any]:
    """Fit with sharded weights, test from the checkpoint, resume, generate, and answer multiple choice."""
    model, runner, metrics = fitted(world, True, backbone, folder)
    data, saved = Sequences(4 // world), folder / "fitted.ckpt"
    metrics |= runner.test(model, datamodule=data, ckpt_path=saved, verbose=False, weights_only=True)[0]
    generated = runner.predict(model, datamodule=data)
    resumed_model = language_model(backbone, True)
    resumed_trainer = trainer(world, folder, max_epochs=2)
    resumed_trainer.fit(resumed_model, datamodule=data, ckpt_path=folder / "fitted.ckpt", weights_only=True)
    resumed_trainer.save_checkpoint(folder / "resumed.ckpt")
    choices = Sequences(4 // world, choices=True)
    metrics |= {
        f"choices/{k}": v
        for k, v in resumed_trainer.validate(resumed_model, datamodule=choices, verbose=False)[0].items()
    }
    scores = resumed_trainer.predict(resumed_model, datamodule=choices)
    return {
        "metrics": metrics,
        "responses": {i: r for b in generated or [] for i, r in zip(b["index"], b["response"], strict=True)},
        "scores": {i: s for b in scores or [] for i, s in zip(b["index"], b["log_probabilities"], strict=True)},
        "sharded": {
            n: tuple(p.to_local().shape) for n, p in resumed_model.named_parameters() if isinstance(p, DTensor)
        },
        "whole": {n: tuple(p.shape) for n, p in resumed_model.named_parameters()},
        "factors": sorted(f"backbone.{name}" for name in adapter_state(resumed_model.backbone)),
        "counts": resumed_model.parameter_counts(),
    }


def resumed_from(start: Path, world: int, shard: bool, backbone: Path, folder: Path) -> None:
    """Resume a checkpoint of another number of ranks, to the end of the second epoch."""
    folder.mkdir(exist_ok=True)
    model, runner = language_model(backbone, shard), trainer(world, folder, max_epochs=2)
    runner.fit(model, datamodule=Sequences(4 // world), ckpt_path=start, weights_only=True)
    runner.save_checkpoint(folder / "resumed.ckpt")


def process(rank: int, port: int, backbone: Path, folder: Path) -> None:
    """Run everything that one of two ranks does, and save its results."""
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), LOCAL_RANK=str(rank), NODE_RANK="0")
    torch.set_num_threads(1)
    small = {"backbone_dtype": "bfloat16", "gradient_checkpointing": True}
    results = {
        "shards": everything(2, backbone, folder / "shards"),
        "small copies": fitted(2, False, backbone, folder / "small copies", **small)[2],
        "small shards": fitted(2, True, backbone, folder / "small shards", **small)[2],
        "refusal": refusal(backbone, folder, rank),
    }
    resumed_from(folder / "one" / "fitted.ckpt", 2, True, backbone, folder / "one to shards")
    torch.save(results, folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


def refusal(backbone: Path, folder: Path, rank: int) -> str:
    """Return the error message for ranks with different frozen weights."""
    torch.manual_seed(rank)
    model = language_model(backbone, True, weights="none")
    with pytest.raises(ModelError) as error:
        trainer(2, folder).fit(model, datamodule=Sequences(2))
    return str(error.value)


def in_two_processes(target: Callable[..., None], *args: Any) -> None:
    """Run a function on two ranks. The processes are forked, so that nothing is imported twice."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=target, args=(rank, port, *args)) for rank in range(2)]
    for each in processes:
        each.start()
    for each in processes:
        each.join(timeout=300)
    hanging = [each for each in processes if each.is_alive()]
    for each in hanging:
        each.kill()
    assert not hanging, "the processes wait for one another"
    assert [each.exitcode for each in processes] == [0, 0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the checkpoints and results of one process, and of two ranks with shards and with copies."""
    folder = tmp_path_factory.mktemp("sharding")
    backbone = save_decoder(folder / "llama")
    torch.save({"one": everything(1, backbone, folder / "one")}, folder / "one.pt")
    in_two_processes(process, backbone, folder)
    resumed_from(folder / "shards" / "fitted.ckpt", 1, False, backbone, folder / "shards to one")
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """Return the results of both ranks."""
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def single(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "one.pt", weights_only=True)["one"]


def checkpoint(folder: Path, run: str, name: str) -> dict[str, Any]:
    return torch.load(folder / run / name, weights_only=True)


# -------------------------------------------------------------------------------------------------------- two processes


def test_each_rank_holds_half_of_the_blocks_frozen_weights(ranks: list[dict[str, Any]], single: dict[str, Any]) -> None:
    assert single["sharded"] == {}
    for rank in ranks:
        shards, shapes = rank["shards"]["sharded"], rank["shards"]["whole"]
        blocks = {name for name in shapes if ".layers." in name and name not in rank["shards"]["factors"]}
        assert set(shards) == blocks
        assert len(blocks) == 2 * 9
        for name, (rows, *others) in shards.items():
            assert [2 * rows, *others] == list(shapes[name]), name
        assert rank["shards"]["counts"] == single["counts"]


@pytest.mark.parametrize(
    ("runs", "name", "steps"),
    [
        (("one", "shards"), "fitted.ckpt", 2),
        (("one", "shards"), "resumed.ckpt", 4),
        (("small copies", "small shards"), "fitted.ckpt", 2),
    ],
)
def test_sharding_does_not_change_checkpoints(
    folder: Path, ranks: list[dict[str, Any]], runs: tuple[str, str], name: str, steps: int
) -> None:
    unsharded, shards = (checkpoint(folder, run, name) for run in runs)
    assert sorted(shards["state_dict"]) == ranks[0]["shards"]["factors"]  # frozen factors included
    assert shards["global_step"] == unsharded["global_step"] == steps
    assert unsharded.keys() == shards.keys()
    assert unsharded["frozen_digest"] == shards["frozen_digest"]
    assert unsharded["state_dict"].keys() == shards["state_dict"].keys()
    for key, tensor in unsharded["state_dict"].items():
        torch.testing.assert_close(shards["state_dict"][key], tensor, rtol=1e-3, atol=1e-5, msg=key)
    shapes = [
        {k: v["exp_avg"].shape for k, v in c["optimizer_states"][0]["state"].items()} for c in (unsharded, shards)
    ]
    assert shapes[0] == shapes[1]
    trained = [tensor for key, tensor in shards["state_dict"].items() if key.endswith(".B")]
    assert all(tensor.abs().max() > 1e-3 for tensor in trained)


@pytest.mark.parametrize("run", ["one to shards", "shards to one"])
def test_resuming_with_another_number_of_ranks_gives_the_same_weights(folder: Path, run: str) -> None:
    single, other = checkpoint(folder, "one", "resumed.ckpt"), checkpoint(folder, run, "resumed.ckpt")
    assert single["global_step"] == other["global_step"] == 4
    for key, tensor in single["state_dict"].items():
        torch.testing.assert_close(other["state_dict"][key], tensor, rtol=1e-3, atol=1e-5, msg=key)
    moments = [c["optimizer_states"][0]["state"] for c in (single, other)]
    for key, state in moments[0].items():
        torch.testing.assert_close(moments[1][key]["exp_avg"], state["exp_avg"], rtol=1e-2, atol=1e-6)


def test_a_resumed_fit_has_trained_further(folder: Path) -> None:
    fitted, resumed = (checkpoint(folder, "shards", f"{name}.ckpt")["state_dict"] for name in ("fitted", "resumed"))
    assert all(torch.equal(tensor, resumed[key]) is key.endswith(".A") for key, tensor in fitted.items())


def test_uneven_evaluation_gives_the_metrics_of_one_process(
    ranks: list[dict[str, Any]], single: dict[str, Any]
) -> None:
    for rank in ranks:
        assert rank["small shards"] == pytest.approx(rank["small copies"], rel=1e-5)
        assert rank["shards"]["metrics"] == pytest.approx(single["metrics"], rel=1e-4)
    assert {"val/loss", "test/loss", "choices/val/acc"} <= single["metrics"].keys()


def test_uneven_generation_gives_the_texts_of_one_process(ranks: list[dict[str, Any]], single: dict[str, Any]) -> None:
    responses = [rank["shards"]["responses"] for rank in ranks]
    assert [sorted(share) for share in responses] == [[0, 2, 4, 6], [1, 3, 5]]
    assert responses[0] | responses[1] == single["responses"]
    # responses of different lengths need different numbers of forward passes
    assert len({len(text) for text in single["responses"].values()}) > 1


def test_multiple_choice_with_prefixes_cached_by_each_rank(ranks: list[dict[str, Any]], single: dict[str, Any]) -> None:
    scores = {index: row for rank in ranks for index, row in rank["shards"]["scores"].items()}
    assert sorted(scores) == list(range(TEST))
    for index, row in single["scores"].items():
        assert scores[index] == pytest.approx(row, abs=1e-3), index


def test_ranks_with_different_frozen_weights_are_refused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "loaded different weights" in rank["refusal"]
        assert "seed_everything" in rank["refusal"]


# ---------------------------------------------------------------------------------------------------------- one process


@pytest.fixture
def backbone(folder: Path) -> Path:
    return folder / "llama"


def test_full_tuning_has_nothing_to_shard() -> None:
    with pytest.raises(ModelError, match=r"model\.shard_frozen: with tuning: full nothing is frozen"):
        LanguageModel(backbone_dtype="float32", tuning="full", shard_frozen=True)


def test_merged_adapters_and_other_strategies_are_refused(backbone: Path) -> None:
    model = language_model(backbone, True)
    model._trainer = stub_trainer(world=2)
    with refuses("needs --trainer.strategy ddp, not SimpleNamespace", error=ModelError):
        model.configure_model()
    model._trainer = stub_trainer(world=2, strategy=DDPStrategy())
    merge(model.backbone)
    with refuses("adapters are merged", error=ModelError):
        model.configure_model()


def test_a_checkpoint_loads_without_a_trainer(folder: Path, backbone: Path) -> None:
    keys = {"backbone": str(backbone), "backbone_dtype": "float32"}
    loaded = LanguageModel.load_from_checkpoint(folder / "shards" / "fitted.ckpt", weights_only=True, **keys)
    expected = checkpoint(folder, "shards", "fitted.ckpt")["state_dict"]
    for name, tensor in adapter_state(loaded.backbone).items():
        assert torch.equal(tensor, expected[f"backbone.{name}"])


@pytest.mark.parametrize("stage", ["predict", "test", "val", "sanity_val"])
def test_a_rank_joins_the_passes_of_others_after_its_last_batch(stage: str) -> None:
    modes = {"predicting": stage == "predict", "testing": stage == "test", "sanity_checking": stage == "sanity_val"}
    runner: Any = SimpleNamespace(**modes, **{f"num_{stage}_batches": [2, 3, 0]})
    shards = FrozenShards.__new__(FrozenShards)
    positions: list[tuple[int, int]] = []
    for loader, batches in enumerate([2, 3]):
        for batch in range(batches):
            shards._agree = lambda own, at=(loader, batch): positions.append(at)  # type: ignore[method-assign]
            shards.after_batch(runner, batch, loader)
    assert positions == [(1, 2)]


class Experts(nn.Module):
    """A model with stacks of blocks that contain inner lists. `config` may have layerdrop."""

    def __init__(self, stacks: int, **config: float) -> None:
        super().__init__()
        self.config = SimpleNamespace(**config)
        self.decoder = nn.Module()
        for i in range(stacks):
            blocks = [nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2)] * 2)}) for _ in range(3)]
            self.decoder.add_module(f"layers{i}", nn.ModuleList(blocks))


@pytest.mark.parametrize("number", [1, 2])
def test_stacks_are_the_outer_lists_of_blocks(number: int) -> None:
    model = Experts(number)
    stacks = sharded_stacks(model)
    assert [stack.name for stack in stacks] == [f"decoder.layers{i}" for i in range(number)]
    assert all(stack.owner is model.decoder and len(stack.blocks) == 3 for stack in stacks)


def test_a_backbone_without_a_stack_is_refused() -> None:
    with pytest.raises(ModelError, match="Experts has no stack of blocks to shard"):
        sharded_stacks(Experts(0))


@pytest.mark.parametrize("key", ["layerdrop", "decoder_layerdrop"])
def test_layerdrop_is_refused(key: str) -> None:
    with pytest.raises(ModelError, match=rf"backbone_args\.{key}: 0\.1"):
        sharded_stacks(Experts(1, **{key: 0.1}))


def test_ranks_that_announce_different_passes_join_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """This rank announces pass 1, but its peer announces pass 0. This rank joins pass 0, and announces pass 1 again."""
    shards = FrozenShards.__new__(FrozenShards)
    shards._passes, shards._device = [[], []], torch.device("cpu")
    of_other_rank = iter([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    monkeypatch.setattr("torch.distributed.all_reduce", lambda own: own.add_(torch.tensor(next(of_other_rank))))
    gathered: list[int] = []
    shards._gather = gathered.append  # type: ignore[method-assign]
    with torch.no_grad():
        shards._announce(1)
    assert gathered == [0]
    assert shards._agree(None) is None
    shards._announce(1)  # with gradients, nothing is announced
