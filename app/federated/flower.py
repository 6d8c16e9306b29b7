"""Messages between Flower's server and its clients. Tensors travel as Flower's arrays (NumPy's format without pickle).

A client is a process of a SuperNode on its own machine, or a worker of Flower's simulation. The values of the node
(`--node-config`) decide which rows a client has:

- `data="PATH"`: the client's own data, in place of the recipe's `data.path`;
- `partition-id` and `num-partitions`: this part of the recipe's training rows. Flower's simulation sets both values.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
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
from app.federated.training import Bench, Client, ClientResult, Job, Tensors
from datamodules.errors import CheckpointError
from modules.adapters.config import Train
from modules.base import AdaptedModule

POLL = 1.0  # seconds between two counts of the connected clients
LEARNED_FROM_DATA = ("class_names", "metrics")  # keys of the model that the server's data decide
_log = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------------------- server


def over_flower(grid: Grid, plan: Plan, arm: Arm, module: AdaptedModule) -> TrainClients:
    """Return a function that trains all connected clients in a round.

    Args:
        grid: Flower's connection to the clients.
        plan: The plan. The function waits until `plan.clients` clients are connected.
        arm: The arm.
        module: The server's model. Its classes become the classes of all clients.
    """
    values = {key: module.hparams[key] for key in LEARNED_FROM_DATA if key in module.hparams}
    words = [f"--model.{key}={json.dumps(value)}" for key, value in values.items()]
    described: set[int] = set()

    def train(tensors: Tensors, job: Job) -> list[ClientResult]:
        nodes = _wait_for_clients(grid, plan.clients)
        content = RecordDict({"tensors": ArrayRecord(tensors), "job": _job_record(plan, arm, words, job)})
        messages = [Message(content, dst_node_id=node, message_type=MessageType.TRAIN) for node in nodes]
        results = []
        for reply in grid.send_and_receive(messages):
            if reply.has_error():
                raise CheckpointError(
                    f"{arm}, round {job.number}: a client failed ({reply.error.reason}). All complete rounds are "
                    "saved. Fix the client, and start the same run again."
                )
            result, description = _read_result(reply.content)
            if result.client not in described:
                described.add(result.client)
                _log.info(description)
            results += [result] if result.tensors else []
        if not results:
            raise CheckpointError(f"{arm}: no client has the rows of one batch. Choose a smaller data.batch_size.")
        numbers = [result.client for result in results]
        if twice := [number for number in numbers if numbers.count(number) > 1]:
            raise CheckpointError(
                f"Two clients have the number {twice[0]}. Give each SuperNode another partition-id (--node-config)."
            )
        return results

    return train


def _wait_for_clients(grid: Grid, count: int) -> list[int]:
    """Return the nodes of the connected clients, once there are enough."""
    nodes = list(grid.get_node_ids())
    if len(nodes) < count:
        _log.info(f"{len(nodes)} of {count} clients are connected. Waiting for the others.")
    while len(nodes) < count:
        time.sleep(POLL)
        nodes = list(grid.get_node_ids())
    return nodes[:count]


def _job_record(plan: Plan, arm: Arm, words: Sequence[str], job: Job) -> ConfigRecord:
    numbers = {"number": job.number, "steps": job.steps, "before": job.before, "total": job.total}
    return ConfigRecord({"plan": plan.to_json(), "arm": arm, "words": list(words), "side": job.side, **numbers})


def _read_result(content: RecordDict) -> tuple[ClientResult, str]:
    values, facts = content["result"], content["facts"]
    tensors = cast(ArrayRecord, content["tensors"]).to_torch_state_dict()
    result = ClientResult(int(values["client"]), int(values["rows"]), float(values["loss"]), dict(tensors))
    return result, str(facts["description"])


# ------------------------------------------------------------------------------------------------------------- client


def make_client_app(parse: ParseFit) -> ClientApp:
    """Return the app of a client, which trains on its own rows when the server asks.

    Args:
        parse: Parser of `fit`.
    """
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        values = cast(Mapping[str, Any], message.content["job"])
        node = {key: context.node_config.get(key) for key in ("data", "partition-id", "num-partitions")}
        bench, client = _open_client(parse, values["plan"], values["arm"], tuple(values["words"]), *node.values())
        tensors: Tensors = dict(cast(ArrayRecord, message.content["tensors"]).to_torch_state_dict())
        job = Job(values["number"], cast(Train, values["side"]), values["steps"], values["before"], values["total"])
        result = ClientResult(client.number, len(client.rows), 0.0, {})
        if client.can_train:
            result = bench.train(client, job, tensors)
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
    parse: ParseFit, plan: str, arm: Arm, words: tuple[str, ...], data: str | None, number: int | None, of: int | None
) -> tuple[Bench, Client]:
    """Return model, data and rows of a client.

    Raises:
        CheckpointError: If the node does not say which rows it has.
    """
    opened = Plan.from_json(plan)
    config = Plan((*opened.words, *words), opened.clients, opened.rounds, opened.local_steps).config(arm, parse)
    if number is None or (data is None and of != opened.clients):
        raise CheckpointError(
            f"--node-config: partition-id is {number} and num-partitions {of}. Give each of {opened.clients} clients "
            f'a partition-id, and its own data="PATH" or num-partitions={opened.clients}.'
        )
    bench = Bench(config, Path(), data)
    bench.inspect(bench.data)
    size = bench.data.training_size
    if data is not None:
        return bench, Client(number, bench.data, torch.arange(size))
    return bench, Client(number, bench.data, opened.split(size, bench.data.training_labels, bench.seed)[number])
