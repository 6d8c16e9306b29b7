"""Flower's apps without Flower's processes: server and clients exchange messages in this process."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from app.cli import FIT_KEYS
from app.federated.server import ROUND
from tests.app.conftest import CommandLine
from tests.app.federated.test_federate import federate
from tests.conftest import ROOT
from tests.support.small_data import write_parquet

flwr = pytest.importorskip("flwr", reason="The extra `federated` is not installed.")

from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from app.commands.federated_flower import make_server_app
from app.federated.flower import ClientError, make_client_app

SIZES = ("--clients", "2", "--rounds", "2", "--local_steps", "2", "--arms", "ffa", "rolora")


@pytest.fixture(autouse=True)
def identity() -> None:
    """Name the process, as Flower's processes do before they make messages."""
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1


class LocalGrid:
    """Grid that calls the clients' app in this process.

    Args:
        nodes: Configuration of each client.
    """

    def __init__(self, *nodes: dict[str, Any]) -> None:
        self.app, self.nodes = make_client_app(FIT_KEYS.parse), nodes

    def get_node_ids(self) -> Iterable[int]:
        return range(len(self.nodes))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        # Replies may come in any order.
        return [self.app(m, context(self.nodes[m.metadata.dst_node_id])) for m in messages][::-1]


def context(node: dict[str, Any] | None = None, **run: Any) -> Context:
    return Context(run_id=1, node_id=0, node_config=node or {}, state=RecordDict(), run_config=run)


def serve(cli: CommandLine, output: Path, grid: LocalGrid, partition: str = "iid") -> None:
    fit = " ".join(f"'{word}'" for word in cli.words("federate")[1:])
    run = {"fit": fit, "clients": 2, "rounds": 2, "local_steps": 2, "partition": partition, "arms": "ffa rolora"}
    make_server_app(FIT_KEYS)(grid, context(**run, output=str(output)))  # type: ignore[arg-type]


def test_flower_and_federate_give_the_same_bits(cli: CommandLine, tmp_path: Path) -> None:
    assert federate(cli, tmp_path / "here", *SIZES, "--partition", "dirichlet:1") == 0
    nodes = [{"partition-id": number, "num-partitions": 2} for number in (1, 0)]
    serve(cli, tmp_path / "flower", LocalGrid(*nodes), "dirichlet:1")
    for arm in ("ffa", "rolora"):
        files = [(tmp_path / name / arm / ROUND).read_bytes() for name in ("here", "flower")]
        assert files[0] == files[1]
    assert (tmp_path / "here/arms.json").read_text() == (tmp_path / "flower/arms.json").read_text()


def test_clients_have_their_own_data(cli: CommandLine, tmp_path: Path) -> None:
    folders = [str(write_parquet(tmp_path / name, {"train": size})) for name, size in {"ada": 20, "bob": 40}.items()]
    assert federate(cli, tmp_path / "here", "--clients", *folders, *SIZES[2:]) == 0
    serve(cli, tmp_path / "flower", LocalGrid(*({"partition-id": i, "data": path} for i, path in enumerate(folders))))
    files = [(tmp_path / name / "rolora" / ROUND).read_bytes() for name in ("here", "flower")]
    assert files[0] == files[1]


def test_clients_of_a_regression_share_the_units_of_the_servers_labels(text_cli: CommandLine, tmp_path: Path) -> None:
    folders = []
    for name, mean in {"data": 683, "ada": 500, "bob": 900}.items():
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        for split in ("train", "validation"):
            rows = "".join(f"w{i} good,{mean + 241 * (i % 2) + 0.5}\n" for i in range(20))
            (folders[-1] / f"{split}.csv").write_text(f"text,score\n{rows}")
    words = ["--data.task=null", "--data.text_columns=[text]", "--data.label_column=score"]
    cli = CommandLine(tmp_path, folders[0], "text", Path(text_cli.backbone[1]))
    cli.backbone += words
    clients = [str(folder) for folder in folders[1:]]
    assert federate(cli, tmp_path / "here", "--clients", *clients, *SIZES[2:]) == 0
    serve(cli, tmp_path / "flower", LocalGrid(*({"partition-id": i, "data": path} for i, path in enumerate(clients))))
    files = [(tmp_path / name / "rolora" / ROUND).read_bytes() for name in ("here", "flower")]
    assert files[0] == files[1]
    rows = json.loads((tmp_path / "flower/arms.json").read_text())
    assert all(row["val/loss"] < 3 for row in rows)


def test_a_node_without_known_rows_is_refused(cli: CommandLine, tmp_path: Path) -> None:
    for wrong in ({"partition-id": 0}, *({"partition-id": n, "num-partitions": 2} for n in (None, "0", -1, 2))):
        with pytest.raises(ClientError, match=r"partition-id from 0 to 1, and its own .* num-partitions=2"):
            serve(cli, tmp_path / "out", LocalGrid(wrong, {"partition-id": 1, "num-partitions": 2}))
    with pytest.raises(ClientError, match="Two clients have the number 0"):
        serve(cli, tmp_path / "out", LocalGrid(*[{"partition-id": 0, "num-partitions": 2}] * 2))


def test_tensors_are_sent_without_pickle() -> None:
    record = ArrayRecord({"x": torch.randn(3)})
    assert [array.stype for array in record.values()] == ["numpy.ndarray"]
    assert b"\x93NUMPY" in next(iter(record.values())).data


def test_pyproject_names_the_components_of_the_app() -> None:
    text = (ROOT / "conf/flower/pyproject.toml").read_text()
    source = (ROOT / "conf/flower/onesided_app.py").read_text()
    for name in ("server_app", "client_app"):
        assert f'"onesided_app:{name}"' in text
        assert f"\n{name} = " in source
