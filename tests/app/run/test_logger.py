"""Contents of each logger: pictures, texts, settings and results of a run."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from jsonargparse import ArgumentError
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from app.run.logger import check_loggers, log_picture, log_results, log_text, viewer_hint
from tests.app.conftest import CommandLine as CommandLine
from tests.app.conftest import cli as cli  # the fixture

PICTURE = np.full((4, 6, 3), 200, np.uint8)


class FakeWandb(WandbLogger):
    """Stand in for W&B's logger, and record the arguments of its public methods."""

    def __init__(self, url: str | None = None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._run = SimpleNamespace(url=url, offline=url is None, dir="/w/wandb/offline-run-1/files")

    @property
    def experiment(self) -> Any:
        return self._run

    def log_image(self, key: str, images: list[Any], step: int | None = None, **_: Any) -> None:
        self.calls.append(("image", key, len(images), step))

    def log_text(
        self, key: str, columns: Any = None, data: Any = None, dataframe: Any = None, step: int | None = None
    ) -> None:
        self.calls.append(("text", key, columns, data, step))

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.calls.append(("metrics", metrics, step))

    def log_hyperparams(self, params: Any) -> None:
        self.calls.append(("settings", params))


class FakeClient:
    """Stand in for mlflow.MlflowClient, and record the arguments of its public methods."""

    tracking_uri = "file:./mlruns"

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def log_image(
        self, run_id: str, image: Any, artifact_file: str | None = None, key: str | None = None, step: int | None = None
    ) -> None:
        self.calls.append(("image", run_id, image.shape, key, step))

    def log_text(self, run_id: str, text: str, artifact_file: str) -> None:
        self.calls.append(("text", run_id, text, artifact_file))


class FakeMLFlow(MLFlowLogger):
    """Stand in for MLflow's logger."""

    def __init__(self) -> None:
        self.client = FakeClient()

    @property
    def experiment(self) -> Any:
        return self.client

    @property
    def run_id(self) -> str:
        return "run"

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.client.calls.append(("metrics", metrics, step))

    def log_hyperparams(self, params: Any) -> None:
        self.client.calls.append(("settings", params))


def test_the_file_store_of_mlflow_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps each metric in a file, and one name of a learning rate is the beginning of another."""
    monkeypatch.setattr(FakeMLFlow, "save_dir", None)
    check_loggers([FakeMLFlow(), FakeWandb()])
    monkeypatch.setattr(FakeMLFlow, "save_dir", "./mlruns")
    with pytest.raises(ArgumentError, match=r"tracking_uri.*\./mlruns.*sqlite:///mlflow\.db"):
        check_loggers([FakeWandb(), FakeMLFlow()])


def trainer_of(folder: Path, *loggers: Any) -> Any:
    return SimpleNamespace(loggers=list(loggers), global_step=7, default_root_dir=str(folder), fast_dev_run=False)


def test_wandb_and_mlflow_receive_everything(tmp_path: Path) -> None:
    wandb, mlflow = FakeWandb(), FakeMLFlow()
    trainer = trainer_of(tmp_path, wandb, mlflow)
    log_picture(trainer, "test/confusion_matrix", PICTURE, "matrix.png")
    log_text(trainer, "val/samples", "A text")
    log_results(trainer, {"rank": 8}, {"best/val/loss": 0.5})
    common = [("settings", {"rank": 8}), ("metrics", {"best/val/loss": 0.5}, 7)]
    of_wandb = [("image", "test/confusion_matrix", 1, 7), ("text", "val/samples", ["text"], [["A text"]], 7)]
    of_mlflow = [("image", "run", (4, 6, 3), "test/confusion_matrix", 7), ("text", "run", "A text", "val/samples-7.md")]
    assert wandb.calls == of_wandb + common
    assert mlflow.client.calls == of_mlflow + common
    assert list(tmp_path.iterdir()) == []


def test_without_a_logger_of_pictures_they_are_saved_in_the_run_directory(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, CSVLogger(tmp_path / "csv"))
    log_picture(trainer, "test/confusion_matrix", PICTURE)  # without a file name, nothing is saved
    assert list(tmp_path.iterdir()) == []
    log_picture(trainer, "spectrum_map/BA", PICTURE, "spectrum_map_BA.png")
    with Image.open(tmp_path / "spectrum_map_BA.png") as image:
        assert (np.asarray(image) == PICTURE).all()


def test_viewer_hint_names_the_command_or_file_of_each_logger(tmp_path: Path) -> None:
    loggers: dict[Any, str] = {
        TensorBoardLogger(tmp_path, name="", version=""): f"tensorboard --logdir {tmp_path}",
        CSVLogger(tmp_path, name="a", version=3): f"{tmp_path}/a/version_3/metrics.csv",
        FakeWandb("https://wandb.ai/x"): "https://wandb.ai/x",
        FakeWandb(): "wandb sync /w/wandb/offline-run-1",
        FakeMLFlow(): "mlflow ui --backend-store-uri file:./mlruns",
    }
    for logger, expected in loggers.items():
        assert viewer_hint(logger) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), {"variant": "B", "train": "B", "rank": 4, "train_targets": "query value"}),
        (("--variant=lora",), {"variant": "lora", "train": "both", "rank": 4, "train_targets": "query value"}),
        (("--variant=head",), {"variant": "head", "train": "head", "rank": 0, "train_targets": ""}),
    ],
)
def test_hparams_have_settings_and_final_metrics(
    cli: CommandLine, options: tuple[str, ...], expected: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli("fit", "--test_after_fit=true", "--seed_everything=3", *options) == 0
    (run,) = cli.root.glob("version_0*")
    assert f"Look inside: tensorboard --logdir {run}\n" in capsys.readouterr().out
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    content = {
        tag: plugin_data_pb2.HParamsPluginData.FromString(data)
        for tag, data in events.PluginTagToContent("hparams").items()
    }
    start = content["_hparams_/session_start_info"].session_start_info.hparams
    settings = {key: getattr(value, value.WhichOneof("kind")) for key, value in start.items()}
    others = {"lr": 0.01, "seed": 3, "train_batch_size": 6, "train_epochs": 2}
    assert settings == {**expected, **others, "data": cli.data.name}
    metrics = [info.name.tag for info in content["_hparams_/experiment"].experiment.metric_infos]
    # the tab shows the first five
    assert metrics[:4] == ["best/val/acc1", "params/trainable", "test/loss", "test/acc1"]
    assert "time/fit_seconds" in metrics
    assert len(metrics) <= 10
    saved = json.loads((run / "metrics.json").read_text())
    for name in metrics:
        assert events.Scalars(name)[-1].value == pytest.approx(saved[name], rel=1e-6)
