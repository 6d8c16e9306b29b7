"""Train one adapter on the rows of many clients by federated averaging, and compare methods (arms) in one table."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from app.config.fit_keys import add_fit_arguments
from app.config.precedence import output_directory
from app.config.program_files import program_command
from app.console import escape_controls
from datamodules.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from app.config.fit_keys import FitKeys
    from app.federated.plan import Arm, Plan
    from app.federated.server import Record, Round, TrainClients
    from app.federated.training import Client, Learner
    from modules.base import AdaptedModule

    Connect = Callable[[Arm, AdaptedModule], TrainClients]

TABLE = "arms"  # arms.csv and arms.json
_log = logging.getLogger(__name__)


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "--clients",
        metavar="N|DIR",
        type=str,
        nargs="+",
        default=[],
        help="Number of clients, among which the recipe's training rows are split; or two or more folders or files, "
        "each with the data of one client (data.path).",
    )
    parser.add_argument("--rounds", metavar="R", type=int, default=10, help="Number of rounds.")
    parser.add_argument(
        "--local_steps", metavar="K", type=int, default=10, help="Optimizer steps of each client in a round."
    )
    parser.add_argument(
        "--partition",
        metavar="iid|dirichlet:ALPHA",
        type=str,
        default="iid",
        help="Split of the rows: at random, or with a different mix of classes for each client (Hsu et al. 2019). A "
        "small ALPHA gives each client few classes.",
    )
    parser.add_argument(
        "--arms",
        metavar="ARM",
        type=str,
        nargs="+",
        default=[],
        help="Methods to compare: ffa (A is frozen, B is averaged), lora (A and B are averaged separately), rolora (B "
        "and A alternate by round), centralised (one client with all rows). Default: all.",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=str,
        required=True,
        help="Directory of the results. The same command with the same directory continues after the last round.",
    )
    add_fit_arguments(parser)


def run(arguments: Namespace) -> None:
    """Train and test all arms, and write the table and the adapters.

    Raises:
        UsageError: If an option has a wrong value, or does not fit the output of an earlier command.
        InputError: If data, model or a round's file cannot be used.
        WriteError: If a file cannot be written.
        SIGTERMException: After a signal. The message has the command that continues the training.
    """
    # Imported here, since `main.py --help` must stay fast.
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from app.federated.plan import check_arms

    plan = make_plan(
        arguments.fit_arguments, arguments.clients, arguments.rounds, arguments.local_steps, arguments.partition
    )
    arms = check_arms(arguments.arms, bool(plan.folders))
    try:
        federate(plan, arms, arguments.fit, arguments.output)
    except SIGTERMException as stop:
        command = shlex.join([*program_command(), *arguments.command_line])
        raise SIGTERMException(f"all complete rounds are saved; the same command continues: {command}") from stop


def federate(plan: Plan, arms: Sequence[Arm], fit: FitKeys, directory: str, connect: Connect | None = None) -> None:
    """Train and test arms, and write and print the table.

    Args:
        plan: The plan.
        arms: The arms.
        fit: Access to the keys of `fit`.
        directory: Directory of the results.
        connect: Function that takes an arm and the server's model, and returns a function that trains remote clients.
            None trains the clients in this process. The arm `centralised` is always trained in this process.

    Raises:
        UsageError: If a key is not supported, or the directory holds other files or a different training.
        InputError: If data, model or a round's file cannot be used.
        WriteError: If a file cannot be written.
    """
    from rich.console import Console

    from app.commands.runs import UNLIMITED
    from app.federated.server import open_federation, refuse_other_files
    from app.run.run_directory import locked

    output = output_directory(directory).resolve()
    configs = {arm: plan.config(arm, fit.parse) for arm in arms}
    first = configs[arms[0]]
    _report_unused_keys(first, fit.defaults())
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output: {output} cannot be created ({error.strerror}). Give another directory.") from error
    refuse_other_files(output)  # Before the lock, which removes links in the directory.
    with locked(output, "--output"):
        open_federation(output, plan.fixed_keys(first))
        rows = [_run_arm(arm, plan, configs[arm], output, connect, is_first=arm == arms[0]) for arm in arms]
        write_table(rows, output)
    Console(width=UNLIMITED).print(table_of(rows, first.checkpoint.monitor))
    print(f"Results: {escape_controls(str(output))}", flush=True)


def make_plan(
    fit_arguments: Sequence[str], clients: Sequence[str], rounds: int, local_steps: int, partition: str
) -> Plan:
    """Return the plan that the options of the command describe.

    Args:
        fit_arguments: Arguments of `fit`, with the recipe.
        clients: Values of `--clients`.
        rounds: Number of rounds.
        local_steps: Optimizer steps of each client in a round.
        partition: Value of `--partition`.

    Raises:
        UsageError: If an option has a wrong value.
    """
    from app.federated.plan import Plan, parse_partition

    for key, value in (("rounds", rounds), ("local_steps", local_steps)):
        if value < 1:
            raise UsageError(f"--{key}: {value} is too small. Give 1 or more.")
    alpha = parse_partition(partition)
    if not clients:
        raise UsageError(
            "--clients: the option is missing. Give a number of clients, or the folder or file of each client."
        )
    if len(clients) == 1 and clients[0].lstrip("-").isdecimal():
        if (number := int(clients[0])) < 1:
            raise UsageError(f"--clients: {number} is too small. Give 1 or more.")
        return Plan(tuple(fit_arguments), number, rounds, local_steps, alpha)
    if missing := [path for path in clients if not Path(path).exists()]:
        raise UsageError(
            f"--clients: {missing[0]!r:.200} is not an existing folder or file. Give one number, or two or more "
            "folders or files."
        )
    if len(clients) < 2:
        raise UsageError(f"--clients: {clients[0]!r:.200} is one client. Give two or more, or use fit.")
    if alpha is not None:
        raise UsageError(
            f"--partition: {partition} splits one data set, but each of --clients has its own data. Remove the option."
        )
    return Plan(tuple(fit_arguments), len(clients), rounds, local_steps, None, tuple(clients))


def _report_unused_keys(config: Namespace, defaults: Namespace) -> None:
    """Log the keys that a federated training ignores: all keys with other values than their defaults, except `USED`."""
    from app.federated.plan import USED

    unused = [k for k, default in defaults.items() if not k.startswith(USED) and config.get(k) != default]
    if unused:
        _log.info(
            f"{', '.join(unused)}: ignored. --rounds and --local_steps set the length of the training. Each client is "
            "trained on one device, without callbacks, loggers and checkpoints."
        )


def _run_arm(arm: Arm, plan: Plan, config: Namespace, output: Path, connect: Connect | None, is_first: bool) -> Record:
    """Train an arm, write its adapter, and return its row of the table. The first arm also prints the clients."""
    from app.federated.server import local_training, run_arm
    from app.federated.training import Learner

    learner = Learner(config, output)
    clients: list[Client] = []
    steps = plan.local_steps
    if connect is not None and arm != "centralised":
        learner.configure_labels()
        train = connect(arm, learner.module)
    else:
        clients = make_clients(plan, learner)
        participants = trainable(clients)
        if arm == "centralised":
            steps *= len(participants)
            participants = [pool_clients(clients)]
        train = local_training(learner, participants)
    if is_first:
        for data in dict.fromkeys([learner.data, *(client.data for client in clients)]):
            for line in data.findings.take_lines():
                _log.info(line)
        for client in clients:
            print(escape_controls(client.description()), flush=True)
    state = run_arm(arm, plan.rounds, steps, learner, train, output, report_round)
    return finish_arm(arm, learner, state, output)


def make_clients(plan: Plan, learner: Learner) -> list[Client]:
    """Return all clients of a plan, with their rows.

    Raises:
        UsageError: If the rows cannot be split as planned.
        DataError: If the data of a client cannot be read.
    """
    import torch

    from app.federated.training import Client

    if not plan.folders:
        learner.read_training_rows(learner.data)
        parts = plan.split(learner.data.training_size, learner.data.training_labels, learner.seed)
        return [Client(number, learner.data, rows) for number, rows in enumerate(parts)]
    learner.configure_labels()  # From the recipe's data, for all clients.
    clients = []
    for number, folder in enumerate(plan.folders):
        data = learner.load_data(folder)
        learner.read_training_rows(data)
        clients.append(Client(number, data, torch.arange(data.training_size)))
    return clients


def pool_clients(clients: Sequence[Client]) -> Client:
    """Return one client with the rows of all clients."""
    import torch

    from app.federated.training import Client

    return Client(0, clients[0].data, torch.cat([client.rows for client in clients]).sort().values)


def trainable(clients: Sequence[Client]) -> list[Client]:
    """Return the clients whose rows fill a batch.

    Raises:
        UsageError: If no client has the rows of one batch.
    """
    participants = [client for client in clients if client.can_train]
    if not participants:
        raise UsageError(
            "data.batch_size: no client has the rows of one batch. Use a smaller batch, or fewer --clients."
        )
    return participants


def report_round(record: Record) -> None:
    """Print a line with the metrics of a round."""
    omitted = ("arm", "round", "clients", "bytes")
    values = ", ".join(f"{key} {value:.4g}" for key, value in record.items() if key not in omitted)
    print(escape_controls(f"{record['arm']}, round {record['round']}: {values}"), flush=True)


def finish_arm(arm: Arm, learner: Learner, state: Round, output: Path) -> Record:
    """Test the last global model, write its adapter in PEFT's format, and return the arm's row of the table.

    Raises:
        WriteError: If the adapter cannot be written.
    """
    import torch

    from app.export.peft import export_peft
    from datamodules.atomic import atomic_directory
    from datamodules.contract import HasTestSplit
    from datamodules.errors import SplitError

    test_metrics: dict[str, float] = {}
    try:
        if isinstance(learner.data, HasTestSplit):
            learner.data.check_test_split()
        test_metrics = learner.test()
    except SplitError as error:
        _log.info(f"No test metrics: {error}")
    learner.load(state.tensors)
    with atomic_directory(output / arm / "adapter", overwrite=True) as folder:
        export_peft(learner.module.cpu(), torch.float32, folder)
    last, rounds = state.history[-1], state.history[1:]
    metrics = {key: value for key, value in last.items() if key.startswith("val/")} | test_metrics
    return {
        "arm": arm,
        "rounds": state.number,
        "clients": last["clients"],
        **metrics,
        "average_error": sum(record["average_error"] for record in rounds) / len(rounds),
        "bytes": sum(record["bytes"] for record in rounds) / len(rounds),
    }


def write_table(rows: Sequence[Record], output: Path) -> None:
    """Write arms.csv and arms.json, with the rows of earlier commands for other arms.

    Raises:
        WriteError: If a file cannot be written.
    """
    from app.federated.plan import ARMS
    from app.federated.server import write_csv
    from datamodules.atomic import atomic_write_text

    path = output / f"{TABLE}.json"
    earlier: list[Record] = []
    if path.is_file():
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(earlier, list) or not all(isinstance(r, dict) and r.get("arm") in ARMS for r in earlier):
                raise ValueError("the file holds no rows of arms")
        except (OSError, ValueError, RecursionError) as error:
            earlier = []
            _log.warning(
                f"{path} cannot be read ({error}). The new table lacks the arms of earlier commands. Repeat these "
                "commands to add their arms again."
            )
    by_arm: dict[Any, Record] = {row["arm"]: row for row in [*earlier, *rows]}
    ordered = [by_arm[arm] for arm in ARMS if arm in by_arm]
    with atomic_write_text(path) as file:
        file.write(json.dumps(ordered, indent=1) + "\n")
    write_csv(output / f"{TABLE}.csv", ordered)


def table_of(rows: Sequence[Record], monitor: str | None) -> Table:
    """Return the table for the terminal: a row for each arm, with the recipe's metric and the test metrics.

    Args:
        rows: Rows of the arms.
        monitor: Name of the metric by which the recipe chooses its best checkpoint.
    """
    from rich import box
    from rich.table import Table

    table = Table("arm", box=box.SIMPLE_HEAD)
    keys = [key for key in rows[0] if (key == monitor or key.startswith("test/")) and all(key in row for row in rows)]
    for name in [*keys, "average error", "KB sent"]:
        table.add_column(name, justify="right")
    for row in rows:
        values = [f"{row[key]:.4f}" for key in keys]
        table.add_row(row["arm"], *values, f"{row['average_error']:.1e}", f"{row['bytes'] / 1e3:,.1f}")
    return table
