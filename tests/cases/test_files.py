"""Cases 12, 32, 37 and 40: damaged caches, symbolic links in a run, full disks, killed writers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
import numpy as np
import pytest
import torch

from datamodules.loading.cache_files import is_intact
from tests.app.test_bad_input import refused
from tests.app.test_cache_prefix import CACHED, OPTIONS
from tests.conftest import ROOT
from tests.support.disks import no_room_for
from tests.support.small_data import png

if TYPE_CHECKING:
    from tests.app.conftest import CommandLine

SHORT = ("--trainer.max_epochs=1", "--trainer.logger=false", "--trainer.limit_val_batches=1")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a new cache for each test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "onesided"


def same_weights(cli: CommandLine, version: int, other: int) -> bool:
    first, second = (cli.checkpoint(number)["state_dict"] for number in (version, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# -------------------------------------------------------------------------------------------------- 12: damaged caches


def _flipped(data: bytes) -> bytes:
    place = 2 * len(data) // 5  # a byte of the rows, which the file formats do not check
    return data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "second half zeros": lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
    "a bit": _flipped,
    "truncated": lambda data: data[: len(data) // 2],
    "emptied": lambda data: b"",
}


@pytest.mark.parametrize(
    "kind",
    [pytest.param("text", marks=pytest.mark.slow), pytest.param("instructions", marks=pytest.mark.slow), "image"],
)
def test_case_12_a_damaged_cache_is_rebuilt(
    request: pytest.FixtureRequest, cache: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    names = {"text": "text_cli", "instructions": "instruction_cli", "image": "cli"}
    line: CommandLine = request.getfixturevalue(names[kind])
    options = [*SHORT, *([*OPTIONS["image"], CACHED] if kind == "image" else [])]
    assert line("fit", *options) == 0
    files = {path: path.read_bytes() for path in cache.iterdir()}
    assert len(files) == 2  # train and validation
    capsys.readouterr()
    for version, kinds in enumerate((("second half zeros", "a bit"), ("truncated", "emptied")), 1):
        for (path, content), damage in zip(files.items(), kinds, strict=True):
            path.write_bytes(DAMAGE[damage](content))
        assert line("fit", *options) == 0
        log = capsys.readouterr().err
        for path, content in files.items():
            assert f"warning: The cache file {path} " in log
            assert path.read_bytes() == content
        assert same_weights(line, version, 0)
    assert line("fit", *options) == 0
    assert "The cache file" not in capsys.readouterr().err
    assert set(cache.iterdir()) == set(files)


# ------------------------------------------------------------------------------------------ 32: symbolic links in a run


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "mine").write_text("a: file of the user\n")
    return folder


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "one.png").write_bytes(png(np.zeros((16, 16, 3), np.uint8)))
    return folder


WRITTEN = (
    *(
        ".lock",
        ".run",
        "config.yaml",
        "hparams.yaml",
        "metrics.json",
        "metrics.csv",
        "spectrum.parquet",
    ),
    *("confusion_matrix.png", "predictions.csv", "skipped.csv", "events.out.tfevents.1.vm.2.0", ".adapter.old"),
    *(
        "checkpoints/.last.ckpt.tmp",
        "checkpoints/.previous.ckpt.tmp",
        "checkpoints/previous.ckpt",
    ),
    *("checkpoints/.best.ckpt.tmp", f".metrics.json.{'0' * 16}.tmp"),
)


@pytest.mark.parametrize("target", [pytest.param("mine", marks=pytest.mark.slow), "new"])
def test_case_32_no_write_follows_a_link(
    fitted_cli: CommandLine,
    outside: Path,
    picture: Path,
    capsys: pytest.CaptureFixture[str],
    target: str,
) -> None:
    run = fitted_cli.run()
    before = snapshot(outside)
    for command, *options in (
        ("fit", "--trainer.max_epochs=2", "--test_after_fit=true"),
        ("test",),
        ("predict", f"--data.predict_path={picture}"),
    ):
        for name in WRITTEN:
            (run / name).unlink(missing_ok=True)
            (run / name).symlink_to(outside / target)
        code = fitted_cli(command, *options, f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}")
        assert code == 0, capsys.readouterr().err
        assert snapshot(outside) == before
        assert f"{run / 'confusion_matrix.png'} was a link to {outside / target}" in capsys.readouterr().err
    assert not (run / "metrics.json").is_symlink()


@pytest.mark.parametrize("name", ["checkpoints", "adapter", "."])
def test_case_32_a_folder_that_is_a_link_is_refused(
    fitted_cli: CommandLine,
    outside: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    folder = Path(os.path.normpath(fitted_cli.run() / name))
    folder.rename(outside / "target")
    folder.symlink_to(outside / "target")
    before = snapshot(outside)
    for command in ("fit", "test"):
        code = fitted_cli(command, "--trainer.max_epochs=2", f"--ckpt_path={fitted_cli.run()}")
        refused(capsys, code, f"{folder} is a link to {outside / 'target'}")
    assert snapshot(outside) == before


def test_case_32_links_of_the_user_are_followed(
    fitted_cli: CommandLine,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The user may link the root of all runs, name a run by a link, and keep a link inside a run."""
    disk = tmp_path / "disk"
    fitted_cli.root.rename(disk)
    fitted_cli.root.symlink_to(disk)
    (disk / "latest").symlink_to("version_0")
    (disk / "version_0" / "newest").symlink_to("checkpoints")
    assert fitted_cli("fit", *SHORT) == 0
    assert (disk / "version_1" / "metrics.json").is_file()
    assert fitted_cli("test", f"--ckpt_path={fitted_cli.root / 'latest'}") == 0
    assert "link" not in capsys.readouterr().err
    assert (disk / "version_0" / "newest").is_symlink()


# ------------------------------------------------------------------------------------------------------- 37: full disks


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("fit", "config.yaml"),
        pytest.param("fit", "hparams.yaml", marks=pytest.mark.slow),
        ("fit", "spectrum.parquet"),
        ("fit", "metrics.json"),
        ("fit", "checkpoints/last.ckpt"),
        ("test", "confusion_matrix.png"),
        ("predict", "predictions.csv"),
    ],
)
def test_case_37_a_full_disk_leaves_each_file_complete_or_unchanged(
    fitted_cli: CommandLine,
    picture: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    name: str,
) -> None:
    run = fitted_cli.run()
    (run / "hparams.yaml").unlink()
    options = {"fit": "--trainer.max_epochs=2", "predict": f"--data.predict_path={picture}"}.get(
        command, "--data.num_workers=0"
    )
    before = snapshot(run)
    with no_room_for(f"/.{Path(name).name}."):
        code = fitted_cli(command, options, f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}")
    refused(capsys, code, str(run / name), "could not be written (No space left on device)")
    after = snapshot(run)
    assert after.get(name) == before.get(name)
    assert all(after.values()), "an empty file"
    assert not [path for path in after if path.endswith(".tmp")]
    assert fitted_cli(command, options, f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}") == 0
    assert (run / name).is_file()


@pytest.mark.parametrize("kind", ["text_cli", "summary_cli", "instruction_cli"])
def test_case_37_a_full_disk_leaves_no_token_cache(
    request: pytest.FixtureRequest, cache: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    line: CommandLine = request.getfixturevalue(kind)
    with no_room_for(".arrow."):
        refused(capsys, line("fit"), "tokens", str(cache), "No space left on device", "HF_DATASETS_CACHE")
    assert list(cache.iterdir()) == []
    assert not line.run().exists()


# --------------------------------------------------------------------------------------------------- 40: killed writers


TOKENISE = """
import sys
import datasets
from datamodules.sources.tables import Table
from datamodules.tokens.tokenizing import tokenized
def encode(rows):
    if rows["text"] != ["a"] * 1000:
        print("half of the rows are written", flush=True)
        sys.stdin.read()
    return {"input_ids": [[1]] * len(rows["text"]), "length": [1] * len(rows["text"])}
tokenized(Table(datasets.Dataset.from_dict({"text": ["a"] * 1000 + ["b"] * 1000}), "a table"), ["text"], encode, {})
"""


@pytest.mark.slow
def test_case_40_temporary_files_are_kept_until_their_writer_is_killed(text_cli: CommandLine, cache: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", TOKENISE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "HF_DATASETS_CACHE": str(cache.parent)},
    ) as process:
        assert process.stdout is not None and process.stdout.readline()
        (temporary,) = cache.iterdir()
        assert temporary.suffix == ".tmp"
        assert text_cli("fit", *SHORT) == 0
        assert temporary.exists()  # its writer is still running
        process.kill()
    assert text_cli("fit", *SHORT) == 0  # this fit reads its tokens from the cache
    assert not temporary.exists()
    assert len(list(cache.iterdir())) == 2
    assert all(is_intact(path) for path in cache.iterdir())


def test_case_40_a_resumed_fit_removes_stale_temporary_files(fitted_cli: CommandLine) -> None:
    """Temporary files of killed fits and exports are removed."""
    run, mark = fitted_cli.run(), f".{'0' * 16}.tmp"
    for name in (f".metrics.json{mark}", f"checkpoints/.last.ckpt{mark}"):
        (run / name).write_bytes(b"half")
    shutil.copytree(run / "adapter", run / f".adapter{mark}")
    assert fitted_cli("fit", "--trainer.max_epochs=2", "--ckpt_path=last") == 0
    assert {path.name for path in run.rglob(".*")} == {".lock"}
