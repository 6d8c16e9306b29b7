"""Private parts of Lightning and jsonargparse that this program uses: each still exists and behaves as before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser
from jsonargparse import _common as jsonargparse_common
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import ModelSummary, WeightAveraging
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import SIGTERMException

from app.lightning_compat import (
    VERDICTS,
    HookedCLI,
    averaged_model,
    import_policy,
    launched_processes,
    move_run_directory,
    stop_after_step,
)


class Model(BoringModel):
    def __init__(self, width: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters()


class CLI(HookedCLI):
    """Record which classes are constructed, and run nothing."""

    def __init__(self, *args: str) -> None:
        self.kinds: list[type] = []
        super().__init__(Model, BoringDataModule, args=list(args), save_config_callback=None)

    def construct(self, kind: type, build: Callable[[], Any]) -> Any:
        self.kinds.append(kind)
        return super().construct(kind, build)

    def fit(self, **arguments: Any) -> None:
        pass


def test_lightning_constructs_each_class_through_the_hook_and_keeps_hyperparameters() -> None:
    cli = CLI("fit", "--model.width=3", "--trainer.callbacks=ModelSummary", "--trainer.callbacks.max_depth=2")
    assert {Model, BoringDataModule, ModelSummary} <= set(cli.kinds)
    assert cli.model.hparams["width"] == 3
    assert cli.model.hparams["_instantiator"] == "lightning.pytorch.cli.instantiate_module"


def test_lightning_reads_no_values_from_a_checkpoint(tmp_path: Path) -> None:
    torch.save({"hyper_parameters": {"width": 5}}, tmp_path / "a.ckpt")
    assert CLI("fit", f"--ckpt_path={tmp_path / 'a.ckpt'}").model.hparams["width"] == 1


def test_move_run_directory_changes_the_trainers_root(tmp_path: Path) -> None:
    trainer = L.Trainer(default_root_dir=tmp_path, logger=False, accelerator="cpu", barebones=True)
    move_run_directory(trainer, str(tmp_path / "elsewhere"))
    assert trainer.default_root_dir == str(tmp_path / "elsewhere")


def test_stop_after_step_ends_the_loop_after_the_step() -> None:
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            stop_after_step(trainer)

    keys = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = L.Trainer(callbacks=[Stop()], max_epochs=1, enable_model_summary=False, **keys)
    with pytest.raises(SIGTERMException):
        trainer.fit(BoringModel())
    assert trainer.global_step == 1


def test_launched_processes_are_those_of_the_launcher() -> None:
    launcher = _SubprocessScriptLauncher(LightningEnvironment(), num_processes=2, num_nodes=1)
    launcher.procs.append(Mock())
    trainer = Mock(spec=L.Trainer, strategy=Mock(launcher=launcher))
    assert launched_processes(trainer) is launcher.procs
    trainer.strategy.launcher = None
    assert launched_processes(trainer) == launched_processes(None) == []


def test_jsonargparse_asks_the_policy_before_it_imports_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "module_of_a_stranger.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    paths_seen: list[str] = []

    def denial(path: str) -> str:
        paths_seen.append(path)
        return f"{path!r} is denied"

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--call", type=Callable)
    parser.add_argument("--kind", type=type)
    assert VERDICTS in jsonargparse_common.parsing_settings
    before = dict(jsonargparse_common.parsing_settings)
    paths = ["module_of_a_stranger.call", "module_of_a_stranger.Class.__call__", "os.path.join.__call__"]
    with import_policy(denial, []):
        for path in paths:
            for option in ("--call", "--kind"):
                with pytest.raises(ArgumentError, match=f"'{path}' is denied"):
                    parser.parse_args([f"{option}={path}"])
    assert set(paths_seen) == set(paths)
    assert jsonargparse_common.parsing_settings == before


def test_jsonargparse_asks_the_policy_for_the_defining_module_too() -> None:
    paths_seen: list[str] = []
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--call", type=Callable)
    with import_policy(paths_seen.append, []):
        parser.parse_args(["--call=os.path.join"])
    assert paths_seen[:2] == ["os.path.join", "posixpath.join"]


def test_lightnings_weight_averaging_has_a_model_with_the_number_of_its_updates() -> None:
    averaging, model = WeightAveraging(), BoringModel()
    averaging.setup(L.Trainer(accelerator="cpu", logger=False), model, "fit")
    average = averaged_model(averaging)
    average.update_parameters(model)
    assert average.n_averaged == 1
    assert [p.shape for p in average.module.parameters()] == [p.shape for p in model.parameters()]
