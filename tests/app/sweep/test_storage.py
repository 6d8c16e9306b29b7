from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.cli import parse_fit
from app.sweep import storage
from app.sweep.folders import is_locked, job_folder, place_of, try_lock
from app.sweep.plan import parse_plan
from app.sweep.schedule import Job
from app.sweep.start import open_ledger
from app.sweep.storage import JOURNAL, JournalLock
from tests.app.sweep.conftest import SweepCommand
from tests.app.sweep.test_plan import content


def test_torn_line_of_the_journal_is_removed(tmp_path: Path) -> None:
    plan = parse_plan(content(), "tiny", parse_fit)
    ledger = open_ledger(plan, None, tmp_path)
    claim = ledger.claim()
    assert claim is not None
    with (tmp_path / JOURNAL).open("a") as file:
        file.write('{"op_code": 5, "wor')  # as after a full disk
    claim.trial.set_user_attr("after", 1)
    (study,) = (ledger.studies[claim.job.variant],)
    assert study.trials[claim.trial.number].user_attrs["after"] == 1
    fresh = open_ledger(plan, None, tmp_path)
    assert fresh.studies[claim.job.variant].trials[claim.trial.number].user_attrs["after"] == 1


def test_lock_of_the_journal_can_be_acquired_again_after_an_interruption(tmp_path: Path) -> None:
    lock = JournalLock(tmp_path / "journal")
    lock.acquire()  # a signal interrupts before the release
    lock.acquire()
    lock.release()
    handle = try_lock(tmp_path / "journal.lock")
    assert handle is not None
    os.close(handle)


def test_lock_of_the_journal_is_released_when_its_process_ends(tmp_path: Path) -> None:
    """Optuna's locks would block every process for 30 seconds after a kill of the holder."""
    process = os.fork()
    if process == 0:
        JournalLock(tmp_path / "journal").acquire()
        os._exit(9)
    os.waitpid(process, 0)
    handle = try_lock(tmp_path / "journal.lock")
    assert handle is not None
    os.close(handle)


def test_claims_are_locked_and_released(tmp_path: Path) -> None:
    plan = parse_plan(content(), "tiny", parse_fit)
    first, second = open_ledger(plan, None, tmp_path), open_ledger(plan, None, tmp_path)
    mine, theirs = first.claim(), second.claim()
    assert mine is not None
    assert theirs is not None
    assert mine.job != theirs.job
    assert is_locked(tmp_path / job_folder(mine.job) / "owner")
    first.release(mine)
    reclaimed = second.claim()
    assert reclaimed is not None
    while reclaimed.job != mine.job:  # a released job goes to the end of the queue
        reclaimed = second.claim()
        assert reclaimed is not None
    # a trial that is recorded as running without a lock has lost its owner
    os.close(reclaimed.lock)
    retaken = first.claim()
    while retaken is not None and retaken.job != mine.job:
        retaken = first.claim()
    assert retaken is not None


def test_folders_of_trials_are_readable_and_unique() -> None:
    def folder(point: str) -> str:
        return str(job_folder(Job("lora+", "confirm", point, 3)))

    assert folder('{"model.learning_rate": 0.001}') == "trials/lora+/learning_rate=0.001/confirm_seed_3"
    assert folder("{}") == "trials/lora+/as_it_is/confirm_seed_3"
    points = [
        '{"a.x": 1, "b.x": 2}',
        '{"a.x": 2, "b.x": 1}',
        '{"data.path": "../../etc"}',
        '{"data.path": "../../etc "}',
        '{"model.adapter.targets": ["query", "value"]}',
        f'{{"data.path": "{"x" * 300}"}}',
    ]
    folders = [folder(point) for point in points]
    assert len({*folders}) == len(points)
    assert all(len(Path(f).parts) == 4 and len(Path(f).parts[2]) < 100 and ".." not in Path(f).parts for f in folders)


def test_place_identifies_the_directory(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    assert place_of(tmp_path / "a") == place_of(tmp_path / "a") != place_of(tmp_path / "b")


def test_an_unusable_database_is_refused(sweep: SweepCommand, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep("--storage=nosuchbase://host/name") == 2
    message = capsys.readouterr().err
    assert message.startswith("error: --storage: the database cannot be used")
    assert "Traceback" not in message


@pytest.mark.slow
def test_sweep_in_a_database(sweep: SweepCommand) -> None:
    sweep.content["variants"] = {"B": {}}
    assert sweep("--workers=2", f"--storage=sqlite:///{sweep.root}/study.db") == 0
    rows = sweep.results()
    assert len(rows) == 5
    assert set(rows["state"]) == {"complete"}
    assert not (sweep.output / JOURNAL).exists()


# ----------------------------------------------------------------------------------------------------------- PostgreSQL


@pytest.fixture
def postgres() -> Iterator[str]:
    """Start a PostgreSQL server on a socket in a temporary folder, and yield its URL."""
    binaries = [shutil.which(name) for name in ("initdb", "postgres")]
    if None in binaries:
        pytest.skip("PostgreSQL is not installed")
    initdb, server = map(str, binaries)
    folder = Path(tempfile.mkdtemp(prefix="onesided-postgres-"))
    user = None
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        user = "nobody"
        shutil.chown(folder, user)
    data = str(folder / "data")
    subprocess.run([initdb, "-D", data, "-U", "tester", "-A", "trust"], user=user, check=True, capture_output=True)
    words = [server, "-D", data, "-k", str(folder), "-c", "listen_addresses=", "-c", "fsync=off"]
    process = subprocess.Popen(words, user=user, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (folder / ".s.PGSQL.5432").exists():
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(1)
        yield f"postgresql+psycopg://tester@/postgres?host={folder}"
    finally:
        process.send_signal(signal.SIGINT)  # on SIGTERM the server would wait for its clients
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _machines(sweep: SweepCommand, root: Path, number: int) -> list[SweepCommand]:
    """Return the same sweep with an output directory for each of several machines."""
    machines = []
    for i in range(number):
        machine = SweepCommand(root / f"machine{i}")
        machine.root.mkdir()
        machine.content = sweep.content
        machines.append(machine)
    return machines


def _run(machines: list[SweepCommand], *options: str) -> None:
    """Run the sweep on all machines at once. Each trial ends once."""
    processes = [machine.start(*options) for machine in machines]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * len(machines), [machine.log() for machine in machines]
    assert set(_ends(machines).values()) == {1}


def _ends(machines: list[SweepCommand]) -> Counter[str]:
    history = sum((machine.history() for machine in machines), Counter())
    return Counter({trial: count for (trial, event), count in history.items() if event == "end"})


@pytest.mark.slow
def test_machines_share_the_trials_in_a_database(
    sweep: SweepCommand, slowly: Callable[[float], None], postgres: str, tmp_path: Path
) -> None:
    slowly(0.02)
    machines = _machines(sweep, tmp_path, 3)
    _run(machines, f"--storage={postgres}", "--workers=2")
    assert len(_ends(machines)) == 10
    for machine in machines:
        machine(f"--storage={postgres}", "--report")
        assert set(machine.results()["state"]) == {"complete"}


@pytest.mark.slow
def test_machines_share_a_sampled_search(
    sweep: SweepCommand, slowly: Callable[[float], None], postgres: str, tmp_path: Path
) -> None:
    slowly(0.02)
    sweep.content["search"] = {"model.learning_rate": {"low": 0.0005, "high": 0.05, "log": True}}
    sweep.content["trials_per_variant"] = 5
    machines = _machines(sweep, tmp_path, 3)
    _run(machines, f"--storage={postgres}", "--workers=2")
    assert len(_ends(machines)) == 2 * 5 + 2


@pytest.mark.slow
def test_trials_of_a_dead_machine_are_run_by_another(
    sweep: SweepCommand,
    slowly: Callable[[float], None],
    postgres: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slowly(0.1)
    monkeypatch.setattr(storage, "HEARTBEAT", 1)
    monkeypatch.setattr("app.sweep.run.HEARTBEAT", 1)
    monkeypatch.setattr(storage, "GRACE", 3)
    machines = _machines(sweep, tmp_path, 2)
    first, second = (machine.start(f"--storage={postgres}") for machine in machines)
    time.sleep(2)
    first.kill()
    first.join()
    second.join()
    assert second.exitcode == 0, machines[1].log()
    # the other machine's lock is not visible here: missing heartbeats reveal its death
    assert "its process has died" not in machines[1].log()
    assert set(machines[1].results()["state"]) == {"complete"}
