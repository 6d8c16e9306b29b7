"""Plan of a federated training: arms, clients, rounds, and the rows of each client."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from jsonargparse import Namespace
from torch import Tensor

from app.config.fit_keys import ParseFit
from app.config.precedence import dotted
from datamodules.errors import UsageError, counted
from datamodules.loading.partition import dirichlet_partition, iid_partition
from modules.adapters.config import Train

# ffa: Sun et al. 2024, arXiv 2403.12313. rolora: Chen et al. 2024, arXiv 2409.02346.
Arm = Literal["ffa", "lora", "rolora", "centralised"]
ARMS: tuple[Arm, ...] = get_args(Arm)
FACTORS: Mapping[Arm, Train] = {"ffa": "B", "lora": "both", "rolora": "both", "centralised": "B"}
TRAINER_KEYS = (  # keys of the recipe's trainer that every client and every evaluation uses
    *("precision", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "deterministic"),
    *("limit_val_batches", "limit_test_batches"),
)
USED = (  # sections and keys of `fit` that a federated training does not ignore, or refuses
    *("model", "data", "seed_everything", "config", "ckpt_path"),
    *(f"trainer.{key}" for key in (*TRAINER_KEYS, "accelerator")),
    *("checkpoint.monitor", "test_after_fit"),  # metric of the printed table; every arm is tested
)
LARGEST_ALPHA = 1e9  # With this α, each client has the class mix of all rows. Sums of larger values can overflow.
# Recorded key of the clients: their number, or the paths of their data. Every federation.json has the key.
CLIENTS = "--clients"
IGNORED = ("data.num_workers", "data.predict_path")  # keys of a recipe that do not change the result


@dataclass(frozen=True)
class Plan:
    """Options of a federated training.

    Args:
        fit_arguments: Arguments of `fit`, with the recipe.
        clients: Number of clients.
        rounds: Number of rounds.
        local_steps: Optimizer steps of each client in a round.
        alpha: Concentration of a Dirichlet partition; None for a random split.
        folders: Folder or file with the data of each client; empty if the recipe's training rows are split.
    """

    fit_arguments: tuple[str, ...]
    clients: int
    rounds: int
    local_steps: int
    alpha: float | None = None
    folders: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Return the plan as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Return the plan that `to_json` wrote."""
        values = json.loads(text)
        return cls(**values | {key: tuple(values[key]) for key in ("fit_arguments", "folders")})

    @property
    def partition(self) -> str:
        """Name of the partition."""
        return "own data" if self.folders else "iid" if self.alpha is None else f"dirichlet:{self.alpha:g}"

    def split(self, size: int, labels: Tensor | None, seed: int) -> list[Tensor]:
        """Return the rows of each client.

        Args:
            size: Number of training rows.
            labels: Class of each row; None if the rows have no labels.
            seed: Seed of the partition.

        Raises:
            UsageError: If there are fewer rows than clients, or a Dirichlet partition has no classes to draw.
        """
        if size < self.clients:
            raise UsageError(
                f"--clients: {counted(size, 'training row is', 'training rows are')} fewer than {self.clients} "
                "clients. Give a smaller number."
            )
        if self.alpha is None:
            return iid_partition(size, self.clients, seed)
        if labels is None or labels.is_floating_point():
            raise UsageError(f"--partition: {self.partition} draws classes, and the training rows have none. Use iid.")
        return dirichlet_partition(labels, self.clients, self.alpha, seed)

    def config(self, arm: Arm, parse: ParseFit) -> Namespace:
        """Return the configuration of an arm, as `fit` parses its arguments.

        All arms start from the same factors. The configurations of the arms differ only in `model.adapter.train`.

        Raises:
            UsageError: If `fit` would reject the arguments, or a federated training does not support them.
        """
        config = parse([*self.fit_arguments, f"--model.adapter.train={FACTORS[arm]}"])
        values = config.model.init_args
        if values.get("tuning") != "adapter":
            raise UsageError(
                f"model.tuning: {values.get('tuning')} has no factors to average. Set model.tuning to adapter."
            )
        if config.ckpt_path is not None:
            raise UsageError(
                f"ckpt_path: {config.ckpt_path} is a checkpoint of fit, which federate cannot resume. To continue a "
                "federated training, repeat its command. To start from trained adapters, set model.adapter_path."
            )
        if values.adapter.init_b not in ("zero", "given"):
            raise UsageError(
                f"model.adapter.init_b: {values.adapter.init_b} is not allowed, since every arm trains B in the first "
                "round. Set init_b to zero and init_a to orthogonal."
            )
        if values.adapter.chain.every_n_epochs is not None:
            raise UsageError(
                f"model.adapter.chain.every_n_epochs: {values.adapter.chain.every_n_epochs} is not supported, since "
                "the merged weights of the clients would differ. Set the key to null."
            )
        return config

    def fixed_keys(self, config: Namespace) -> dict[str, Any]:
        """Return the values that decide the result, by key, as JSON values. The values are the same for all arms."""
        trainer = config.trainer.as_dict()
        sections = {
            "model": config.model.as_dict(),
            "data": config.data.as_dict(),
            "trainer": {key: trainer.get(key) for key in TRAINER_KEYS},
        }
        keys = dotted(sections) | {
            "seed_everything": config.seed_everything,
            CLIENTS: list(self.folders) or self.clients,
            "--rounds": self.rounds,
            "--local_steps": self.local_steps,
            "--partition": self.partition,
        }
        ignored = (*IGNORED, "model.adapter.train")
        return json.loads(json.dumps({k: v for k, v in keys.items() if k not in ignored}, default=str))


def seed_of(config: Namespace) -> int:
    """Return the seed of a configuration; 0 if `seed_everything` is not a number."""
    seed = config.seed_everything
    return 0 if seed is None or isinstance(seed, bool) else int(seed)


def trained_side(arm: Arm, number: int) -> Train:
    """Return the factors that an arm trains in a round. Rounds count from 1. RoLoRA alternates and begins with B."""
    if arm == "rolora":
        return "B" if number % 2 else "A"
    return FACTORS[arm]


def parse_partition(text: str) -> float | None:
    """Return α of `dirichlet:ALPHA`, or None for `iid`.

    Raises:
        UsageError: For any other text, or an α that is not above 0.
    """
    if text == "iid":
        return None
    match = re.fullmatch(r"dirichlet:(.+)", text)
    try:
        alpha = float(match[1]) if match else math.nan
    except ValueError:
        alpha = math.nan
    if not 0 < alpha <= LARGEST_ALPHA:
        raise UsageError(
            f"--partition: {text!r:.80} is not known. Use iid, or dirichlet:ALPHA with ALPHA above 0 and at most "
            f"{LARGEST_ALPHA:g}."
        )
    return alpha


def check_arms(arms: Sequence[str], own_data: bool) -> list[Arm]:
    """Return the arms of `--arms` without duplicates, in the order of `ARMS`.

    Args:
        arms: Values of the option; empty for all possible arms.
        own_data: True if each client has its own data. No data set then has all rows, and centralised is impossible.

    Raises:
        UsageError: For an unknown arm, or for centralised with own data.
    """
    possible = [arm for arm in ARMS if not (own_data and arm == "centralised")]
    for arm in arms:
        if arm not in ARMS:
            raise UsageError(f"--arms: {arm!r:.80} is not known. Choose from {', '.join(ARMS)}.")
        if arm not in possible:
            raise UsageError(
                "--arms: centralised needs all rows in one data set, and each of --clients has its own data. Give a "
                "number of clients, or leave centralised out."
            )
    chosen = list(dict.fromkeys(arms)) or possible
    return [arm for arm in possible if arm in chosen]
