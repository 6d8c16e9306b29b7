"""Rounds of the server: average the clients' tensors, evaluate and save each round. A killed command can resume.

    DIR/federation.json          values that decide the result
    DIR/rounds.csv               metrics after each round, for all arms
    DIR/ARM/round.safetensors    the global model after the last complete round, with the metrics of all rounds

A round is complete when its file has replaced the file of the previous round. Each client's training depends on the
global model, the round and the seed alone. A resumed arm therefore ends with the same tensors as an uninterrupted arm.
"""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from app.federated.plan import ARMS, CLIENTS, Arm, trained_side
from app.federated.training import Client, ClientResult, Job, Learner, Tensors
from datamodules.atomic import atomic_write, atomic_write_text, write_errors
from datamodules.errors import CheckpointError, ModelError, UsageError
from modules.adapters.config import Train
from modules.adapters.state import state_problems
from modules.analysis.averaging import average, average_error

FEDERATION, ROUNDS, ROUND = "federation.json", "rounds.csv", "round.safetensors"
SECTION = "federation"  # key of the metadata in a round's file
FORMAT = 1  # version of the round's file
Record = dict[str, Any]
# Function that trains all clients in a round, from the global model.
TrainClients = Callable[[Tensors, Job], Sequence[ClientResult]]
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Round:
    """The global model after a round.

    Args:
        number: Number of the round; 0 before the first.
        tensors: All factors and heads.
        history: Metrics after each round, from round 0 on.
    """

    number: int
    tensors: Tensors
    history: list[Record]


def refuse_other_files(folder: Path) -> None:
    """Refuse a directory that no federated training has written. No file is changed.

    Raises:
        UsageError: If the directory holds other files, or cannot be read.
    """
    if CLIENTS in _read_keys(folder):
        return
    try:
        others = [entry.name for entry in folder.iterdir() if not entry.name.startswith(".")]
    except OSError as error:
        raise UsageError(f"--output: {folder} cannot be read ({error.strerror}). Give another directory.") from error
    if others:
        raise UsageError(f"--output: {folder} holds other files ({min(others)}). Give a new or an empty directory.")


def open_federation(folder: Path, keys: Mapping[str, Any]) -> None:
    """Record the values that decide the result, or compare them with the recorded values.

    If no arm has a round's file, the record of an earlier, failed command is replaced.

    Raises:
        UsageError: If the folder holds other files, or a federated training with other values.
        WriteError: If the file cannot be written.
    """
    refuse_other_files(folder)
    if not any((folder / arm / ROUND).exists() for arm in ARMS):
        with atomic_write_text(folder / FEDERATION) as file:
            file.write(json.dumps(dict(keys), indent=1, ensure_ascii=False) + "\n")
        return
    recorded = _read_keys(folder)
    for key in sorted(recorded.keys() | keys.keys()):
        if recorded.get(key) != keys.get(key):
            raise UsageError(
                f"{key}: {keys.get(key)!r:.120} differs from {recorded.get(key)!r:.120} in {folder / FEDERATION}. Use "
                "the recorded value to continue this training, or give another --output."
            )


def _read_keys(folder: Path) -> dict[str, Any]:
    """Return the values that `open_federation` recorded; empty if the folder has no record."""
    path = folder / FEDERATION
    if not path.exists():
        return {}
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(recorded, dict):
            raise ValueError("the file holds no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"--output: {path} cannot be read ({error}). Give another directory.") from error
    return recorded


def read_round(folder: Path, expected: Mapping[str, Tensor] | None = None) -> Round | None:
    """Return the last complete round of an arm, or None before the first.

    Args:
        folder: Folder of the arm.
        expected: Tensors with the names, shapes and dtypes of the model; None skips the comparison.

    Raises:
        CheckpointError: If the file is damaged, or does not fit the model.
    """
    path = folder / ROUND
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            content = json.loads((file.metadata() or {}).get(SECTION, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"the header is not of format {FORMAT}")
        number, history = content["round"], content["history"]
        if type(number) is not int or not isinstance(history, list) or len(history) != number + 1:
            raise ValueError("the history is incomplete")
        if not all(_is_record(record, number > 0) for number, record in enumerate(history)):
            raise ValueError("the history lacks metrics")
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError("a tensor is not finite")
    except (SafetensorError, OSError, ValueError, KeyError, RecursionError) as error:
        raise CheckpointError(
            f"--output: {path} cannot be read ({error}). Remove the file to train this arm again."
        ) from error
    if expected is not None and (problems := tensor_problems(expected, tensors)):
        raise CheckpointError(
            f"--output: {path} does not fit the model: {'; '.join(problems)}. Remove the file to train this arm again."
        )
    return Round(number, tensors, history)


def _is_record(record: Any, is_trained: bool) -> bool:
    """Return True if a record has the metrics that `run_arm` and `next_round` write."""
    required = ("round", *(("average_error", "clients", "bytes") if is_trained else ()))
    return isinstance(record, dict) and all(
        isinstance(record.get(key), int | float) for key in {*required, *record} - {"arm"}
    )


def tensor_problems(expected: Mapping[str, Tensor], actual: Mapping[str, Tensor]) -> list[str]:
    """Return the differences between tensors and the expected tensors: names, shapes and dtypes."""
    return state_problems(expected, actual) + [
        f"{name} is {tensor.dtype}, not {expected[name].dtype}"
        for name, tensor in actual.items()
        if name in expected and tensor.dtype != expected[name].dtype
    ]


def write_round(folder: Path, state: Round) -> None:
    """Replace the file of an arm's last complete round.

    Raises:
        WriteError: If the file cannot be written. The file of the previous round is then unchanged.
    """
    with write_errors(folder):
        folder.mkdir(exist_ok=True)
    content = {"format": FORMAT, "round": state.number, "history": state.history}
    with atomic_write(folder / ROUND) as file:
        file.write(save(state.tensors, metadata={SECTION: json.dumps(content)}))


def write_rounds(folder: Path) -> None:
    """Write `rounds.csv` from the complete rounds of all arms."""
    rows = [row for arm in ARMS if (state := read_round(folder / arm)) is not None for row in state.history]
    write_csv(folder / ROUNDS, rows)


def write_csv(path: Path, rows: Sequence[Record]) -> None:
    """Write rows as CSV. The columns are the keys of all rows."""
    with atomic_write_text(path) as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def run_arm(
    arm: Arm,
    rounds: int,
    steps: int,
    learner: Learner,
    train: TrainClients,
    folder: Path,
    report: Callable[[Record], None],
) -> Round:
    """Train an arm to its last round, from its last complete round on.

    Args:
        arm: The arm. For centralised, `train` trains one client with all rows.
        rounds: Number of rounds.
        steps: Optimizer steps of each client in a round.
        learner: Model and data for the evaluation of the global model. The heads must have their shapes already.
        train: Function that trains all clients in a round.
        folder: The directory of the federated training.
        report: Function that is called with the metrics of each new round.

    Returns:
        The global model after the last round.

    Raises:
        ModelError: If the model diverges.
        CheckpointError: If the file of the last round is damaged.
        WriteError: If a file cannot be written.
    """
    arm_folder = folder / arm
    state = read_round(arm_folder, learner.state())
    if state is None:
        state = Round(0, learner.state(), [{"arm": arm, "round": 0, **learner.validate()}])
        write_round(arm_folder, state)
        report(state.history[0])
    elif state.number < rounds:
        _log.info(f"{arm} continues after round {state.number} of {rounds}.")
    else:
        _log.info(f"{arm} is complete: all {rounds} rounds are in {arm_folder / ROUND}.")
    write_rounds(folder)  # A command that was killed after `write_round` has not added its last round to rounds.csv.
    while state.number < rounds:
        number = state.number + 1
        job = Job(number, trained_side(arm, number), steps, state.number * steps, rounds * steps)
        state = next_round(arm, learner, state, job.side, train(state.tensors, job))
        write_round(arm_folder, state)
        write_rounds(folder)
        report(state.history[-1])
    learner.load(state.tensors)
    return state


def next_round(arm: Arm, learner: Learner, state: Round, side: Train, results: Sequence[ClientResult]) -> Round:
    """Return the global model after a round: the average of the clients' tensors, weighted by their numbers of rows.

    The record of the round has the metrics of validation, and:

    - `train/loss`: mean of the clients' losses at their last step, by rows;
    - `average_error`: distance of the new update from the average of the clients' updates, relative to the norm of this
      average;
    - `clients` and `bytes`: number of clients, and mean bytes that a client sends.
    """
    results = sorted(results, key=lambda result: result.client)
    for result in results:
        check_result(result, state.tensors, learner.trained_names(side), f"{arm}, round {state.number + 1}")
    weights = [result.rows for result in results]
    averaged = average([result.tensors for result in results], weights)
    tensors = state.tensors | averaged
    updates = [learner.updates(state.tensors | result.tensors) for result in results]
    learner.load(tensors)
    record = {
        "arm": arm,
        "round": state.number + 1,
        **learner.validate(),
        "train/loss": sum(result.loss * result.rows for result in results) / sum(weights),
        "average_error": average_error(learner.updates(tensors), updates, weights),
        "clients": len(results),
        "bytes": sum(result.bytes for result in results) / len(results),
    }
    return Round(state.number + 1, tensors, [*state.history, record])


def check_result(result: ClientResult, tensors: Tensors, names: Collection[str], where: str) -> None:
    """Check a client's result: names, shapes, dtypes and values of the tensors, and the number of rows.

    Args:
        result: The client's result.
        tensors: The global model.
        names: Names of the tensors that are trained in this round.
        where: Arm and round, for messages.

    Raises:
        ModelError: If the result cannot be averaged.
    """
    expected = {name: tensors[name] for name in names}
    problems = tensor_problems(expected, result.tensors)
    problems += ["the client has no rows"] if result.rows < 1 else []
    if problems:
        raise ModelError(
            f"{where}: the result of client {result.client} does not fit the model ({'; '.join(problems)}). Run the "
            "same version of this program on all clients."
        )
    for name, tensor in result.tensors.items():
        if not tensor.isfinite().all():
            raise ModelError(
                f"{where}: {name} of client {result.client} is no longer finite. Start again with another --output, "
                "and a lower --model.learning_rate or fewer --local_steps."
            )


def local_training(learner: Learner, clients: Sequence[Client]) -> TrainClients:
    """Return a function that trains clients one after the other in this process."""

    def train(tensors: Tensors, job: Job) -> list[ClientResult]:
        return [learner.train(client, job, tensors) for client in clients]

    return train
