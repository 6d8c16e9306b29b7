"""Training of one client on its rows, and evaluation of the global model.

`federate` and Flower's clients train with the same `Learner`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import Namespace
from torch import Tensor

from app.config.constructors import construct, construct_accelerator
from app.federated.plan import TRAINER_KEYS, seed_of
from app.run.failures import construction_errors
from app.run.trainers import metrics_of, quiet_trainer
from datamodules.base import Part, ResumableDataModule
from datamodules.errors import UsageError
from datamodules.loading.batching import derive_seed
from modules.adapters import adapted_projections, set_trained
from modules.adapters.config import Train
from modules.analysis.combination import Update
from modules.base import AdaptedModule

LISTED_CLASSES = 20  # largest number of classes in the description of a client
Tensors = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Client:
    """A client with its training rows.

    Args:
        number: Number of the client, from 0. The order of the client's batches depends on the number.
        data: The data module with the rows of this client.
        rows: Indices of the client's rows among the data module's training rows, (rows,) int64.
    """

    number: int
    data: ResumableDataModule
    rows: Tensor

    @property
    def can_train(self) -> bool:
        """True if the rows fill a batch."""
        return len(self.rows) >= self.data.batch_size

    def description(self) -> str:
        """Return a line with the client's number of rows, in total and of each class."""
        text = f"client {self.number}: {len(self.rows):,} rows"
        names, labels = getattr(self.data, "class_names", None), self.data.training_labels
        if names and labels is not None and not labels.is_floating_point():
            counts = labels[self.rows].bincount(minlength=len(names)).tolist()
            listed = [f"{name}: {count:,}" for name, count in zip(names, counts, strict=True) if count]
            text += f" ({', '.join(listed[:LISTED_CLASSES])}{', …' if len(listed) > LISTED_CLASSES else ''})"
        if not self.can_train:
            text += f"; skipped, since a batch has {self.data.batch_size} rows (data.batch_size)"
        return text


@dataclass(frozen=True)
class Job:
    """Settings of a client's training in one round.

    Args:
        number: Number of the round, from 1.
        side: Factors that are trained. The heads are trained in every round.
        steps: Optimizer steps of the client in this round.
        previous_steps: Optimizer steps of the client in earlier rounds.
        total_steps: Optimizer steps of the client in all rounds. The learning rate schedule spans these steps.
    """

    number: int
    side: Train
    steps: int
    previous_steps: int
    total_steps: int


@dataclass(frozen=True, eq=False)
class ClientResult:
    """Result that a client returns to the server.

    Args:
        client: Number of the client.
        rows: Number of training rows, and weight of the client in the average.
        loss: Training loss of the last step.
        tensors: Trained factors and heads.
    """

    client: int
    rows: int
    loss: float
    tensors: Tensors

    @property
    def bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


class Learner:
    """Model and data of a recipe: train one client after the other, and evaluate the global model.

    Args:
        config: Configuration of `fit`.
        folder: Lightning's `default_root_dir`. Loggers and checkpoints are off, so Lightning writes nothing.
        path: Data in place of the recipe's `data.path`.
    """

    def __init__(self, config: Namespace, folder: Path, path: str | None = None) -> None:
        self.config, self.folder, self.seed = config, folder, seed_of(config)
        L.seed_everything(self.seed, workers=True, verbose=False)
        with construction_errors(config, "model"):
            self.module = construct(AdaptedModule, config.model)
        self.data = self.load_data(path)

    def load_data(self, path: str | None = None) -> ResumableDataModule:
        """Return the recipe's data module, with the recipe's data or with data from another path.

        Raises:
            UsageError: If the data module does not derive from `ResumableDataModule`.
        """
        config = self.config if path is None else self.config.clone()
        if path is not None:
            config.data.init_args.path = path
        with construction_errors(config, "data"):
            data: Any = construct(L.LightningDataModule, config.data)
        if not isinstance(data, ResumableDataModule):
            raise UsageError(
                f"data: {self.config.data.class_path} cannot train on a part of its rows. Use a data module that "
                "derives from ResumableDataModule."
            )
        data.caches_validation = True
        return data

    def configure_labels(self) -> None:
        """Set classes and metrics of the model from the recipe's data.

        In a regression, the training rows also set the scaling of the labels, which is the same for all clients.
        """
        self.validate()
        if self.module.class_names == [] and self.module.hparams["label_scaling"] is None:
            self.read_training_rows(self.data)

    def read_training_rows(self, data: ResumableDataModule) -> None:
        """Read the training rows of a data module, and set its `training_size` and `training_labels`.

        The heads of the model get their shapes from the classes of the first data module.
        """
        data.part = Part(torch.empty(0, dtype=torch.int64), 0, 0, 0)
        trainer = self._trainer(
            max_epochs=1, limit_train_batches=0, limit_val_batches=0, callbacks=[BuildTrainLoader()]
        )
        trainer.fit(self.module, datamodule=data)

    def train(self, client: Client, job: Job, state: Mapping[str, Tensor]) -> ClientResult:
        """Train a client from the global model for some optimizer steps, with a new optimizer.

        The result depends only on the arguments and the configuration. Earlier calls do not change the result.

        Args:
            client: The client.
            job: Settings of the training in this round.
            state: Tensors of the global model by the names of `saved_state`. Missing tensors keep their values.
        """
        self.load(state)
        set_trained(self.module.backbone, job.side)
        accumulated = self.config.trainer.accumulate_grad_batches
        seed = derive_seed(self.seed, client.number)
        client.data.part = Part(client.rows, job.previous_steps * accumulated, job.steps * accumulated, seed)
        self.module.schedule_window = (job.previous_steps, job.total_steps)
        L.seed_everything(derive_seed(self.seed, client.number, job.number) % 2**32, workers=True, verbose=False)
        trainer = self._trainer(max_epochs=1, limit_val_batches=0)
        trainer.fit(self.module, datamodule=client.data)
        loss = float(trainer.callback_metrics["train/loss"])
        trained = {name: p.detach().cpu().clone() for name, p in self.module.named_parameters() if p.requires_grad}
        return ClientResult(client.number, len(client.rows), loss, trained)

    def trained_names(self, side: Train) -> set[str]:
        """Set the trained factors, and return the names of all trained tensors: these factors, and the heads."""
        set_trained(self.module.backbone, side)
        return {name for name, p in self.module.named_parameters() if p.requires_grad}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Load tensors of the global model. Missing tensors keep their values."""
        self.module.load_state_dict({**self.module.saved_state(), **state})

    def state(self) -> Tensors:
        """Return copies of all factors and of the heads."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.module.saved_state().items()}

    def validate(self) -> dict[str, float]:
        """Return the metrics of the recipe's validation split by logged name."""
        return metrics_of(self._trainer().validate(self.module, datamodule=self.data, verbose=False))

    def test(self) -> dict[str, float]:
        """Return the metrics of the recipe's test split by logged name."""
        return metrics_of(self._trainer().test(self.module, datamodule=self.data, verbose=False))

    def updates(self, state: Mapping[str, Tensor]) -> list[Update]:
        """Return the update s·B·A of each adapted projection, with the factors of `state`."""
        updates = []
        for _, factors in adapted_projections(self.module.backbone).values():
            prefix = f"backbone.{factors.projection.layer}.adapters.{factors.projection.role}"
            updates.append(Update(state[f"{prefix}.A"], state[f"{prefix}.B"], factors.scale))
        return updates

    def _trainer(self, **keys: Any) -> L.Trainer:
        """Return a trainer with the recipe's precision and device. The trainer logs and saves nothing."""
        recipe = self.config.trainer
        keys = {key: recipe[key] for key in TRAINER_KEYS} | keys
        accelerator = construct_accelerator(recipe.accelerator)
        return quiet_trainer(accelerator=accelerator, default_root_dir=str(self.folder), **keys)


class BuildTrainLoader(L.Callback):
    """Build the training loader before a fit without training batches. Lightning alone would build none."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Build the loader, after Lightning has moved the model to its device."""
        trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]
