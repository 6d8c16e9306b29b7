"""Messages between Flower's server and its clients. Tensors are sent as Flower's arrays (NumPy's format, no pickle).

A client is a process of a SuperNode on its own machine, or a worker of Flower's simulation. The values of
`--node-config` decide which rows a client has:

- `data="PATH"`: data of this client, in place of the recipe's `data.path`;
- `partition-id` and `num-partitions`: the client's part of the recipe's training rows. Flower's simulation sets both
  values.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from app.config.fit_keys import ParseFit
from app.federated.plan import Arm, Plan
from app.federated.server import TrainClients
from app.federated.training import Client, ClientResult, Job, Learner, Tensors
from datamodules.errors import InputError
from modules.base import AdaptedModule

POLL_SECONDS = 1.0  # seconds between two counts of the connected clients
# Keys of the model that the server's data decides. The clients take these values from the server.
DATA_DEPENDENT_KEYS = ("class_names", "metrics", "label_scaling")
_log = logging.getLogger(__name__)


class ClientError(InputError):
    """Raised if a client of a federated training fails, or is not configured for the training."""


# ------------------------------------------------------------------------------------------------------------- server


def flower_training(grid: Grid, plan: Plan, arm: Arm, module: AdaptedModule) -> TrainClients:
    """Return a function that trains `plan.clients` clients in a round, over Flower.

    The function waits until as many clients are connected. The function raises ClientError if a client fails.

    Args:
        grid: Flower's connection to the clients.
        plan: The plan.
        arm: The arm.
        module: The server's model, whose classes become the classes of all clients.
    """
    keys = [key for key in DATA_DEPENDENT_KEYS if key in module.hparams]
    model_arguments = [f"--model.{key}={json.dumps(module.hparams[key])}" for key in keys]
    logged: set[int] = set()

    def train(tensors: Tensors, job: Job) -> list[ClientResult]:
        nodes = _wait_for_clients(grid, plan.clients)
        values = {"plan": plan.to_json(), "arm": arm, "model_arguments": model_arguments, **asdict(job)}
        content = RecordDict({"tensors": ArrayRecord(tensors), "job": ConfigRecord(values)})
        messages = [Message(content, dst_node_id=node, message_type=MessageType.TRAIN) for node in nodes]
        results = []
        for reply in grid.send_and_receive(messages):
            if reply.has_error():
                raise ClientError(
                    f"{arm}, round {job.number}: a client failed ({reply.error.reason}). All complete rounds are "
                    "saved. Fix the client, and repeat the command."
                )
            result, description = _read_result(reply.content)
            if result.client not in logged:
                logged.add(result.client)
                _log.info(description)
            results += [result] if result.tensors else []
        if not results:
            raise ClientError(f"data.batch_size: no client has the rows of one batch ({arm}). Use a smaller batch.")
        numbers = [result.client for result in results]
        if duplicates := [number for number in numbers if numbers.count(number) > 1]:
            raise ClientError(
                f"Two clients have the number {duplicates[0]}. Give each SuperNode a different partition-id "
                "(--node-config)."
            )
        return results

    return train


def _wait_for_clients(grid: Grid, count: int) -> list[int]:
    """Wait until `count` clients are connected, and return the ids of their nodes."""
    nodes = list(grid.get_node_ids())
    if len(nodes) < count:
        _log.info(f"{len(nodes)} of {count} clients are connected. Waiting for more.")
    while len(nodes) < count:
        time.sleep(POLL_SECONDS)
        nodes = list(grid.get_node_ids())
    return nodes[:count]


def _read_result(content: RecordDict) -> tuple[ClientResult, str]:
    values, facts = content["result"], content["facts"]
    tensors = cast(ArrayRecord, content["tensors"]).to_torch_state_dict()
    result = ClientResult(int(values["client"]), int(values["rows"]), float(values["loss"]), dict(tensors))
    return result, str(facts["description"])


# ------------------------------------------------------------------------------------------------------------- client


def make_client_app(parse: ParseFit) -> ClientApp:
    """Return Flower's app of a client. The app trains on the client's rows when the server sends a message.

    Args:
        parse: Parser of `fit`.
    """
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        values = cast(Mapping[str, Any], message.content["job"])
        node = {key: context.node_config.get(key) for key in ("data", "partition-id", "num-partitions")}
        model_arguments = tuple(values["model_arguments"])
        learner, client = _open_client(parse, values["plan"], values["arm"], model_arguments, *node.values())
        tensors: Tensors = dict(cast(ArrayRecord, message.content["tensors"]).to_torch_state_dict())
        job = Job(**{field.name: values[field.name] for field in fields(Job)})
        result = ClientResult(client.number, len(client.rows), 0.0, {})
        if client.can_train:
            result = learner.train(client, job, tensors)
        numbers = {"client": result.client, "rows": result.rows, "loss": result.loss}
        records = {
            "tensors": ArrayRecord(result.tensors),
            "result": MetricRecord(numbers),
            "facts": ConfigRecord({"description": client.description()}),
        }
        return Message(RecordDict(records), reply_to=message)

    return app


@lru_cache(maxsize=1)  # A process may get many messages, and building a model takes seconds.
def _open_client(
    parse: ParseFit,
    plan_json: str,
    arm: Arm,
    model_arguments: tuple[str, ...],
    data: str | None,
    number: int | None,
    partitions: int | None,
) -> tuple[Learner, Client]:
    """Return a learner with the client's data, and the client with its rows.

    Raises:
        ClientError: If `--node-config` does not determine the rows of the client.
    """
    plan = Plan.from_json(plan_json)
    config = replace(plan, fit_arguments=(*plan.fit_arguments, *model_arguments)).config(arm, parse)
    is_part = data is None and partitions == plan.clients
    if type(number) is not int or number < 0 or not (data is not None or (is_part and number < plan.clients)):
        raise ClientError(
            f"--node-config: partition-id is {number!r} and num-partitions {partitions!r}. Give each of {plan.clients} "
            f'clients a partition-id from 0 to {plan.clients - 1}, and its own data="PATH" or '
            f"num-partitions={plan.clients}."
        )
    learner = Learner(config, Path(), data)
    learner.read_training_rows(learner.data)
    size = learner.data.training_size
    if data is not None:
        return learner, Client(number, learner.data, torch.arange(size))
    return learner, Client(number, learner.data, plan.split(size, learner.data.training_labels, learner.seed)[number])
