"""Cache files: any damage is found, warned about and leads to a new file."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from datamodules.loading import cache_files
from datamodules.loading.cache_files import SEAL_BYTES, is_intact, write_cache

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "cache" / "tokens.arrow"
    with write_cache(path) as file:
        file.write(CONTENT[:100])
        file.write(CONTENT[100:])
    return path


def test_a_cache_file_is_its_content_and_a_digest(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = path.read_bytes()
    assert data[:-SEAL_BYTES] == CONTENT
    assert data[-SEAL_BYTES:].startswith(b"\nonesided cache=0001 bytes=00000000000000010240 xxh3=")
    assert is_intact(path) and is_intact(path, verify=False)
    assert not is_intact(path.with_name("other.arrow"))
    assert caplog.records == []


def flipped(place: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "first bit": (flipped(0), "does not match its digest"),
    "a bit in the middle": (flipped(5000), "does not match its digest"),
    "last bit of the digest": (flipped(len(CONTENT) + SEAL_BYTES - 2), "no digest|does not match"),
    "a bit of the version": (flipped(len(CONTENT) + 19), "is of version 0, not 1"),
    "zeros in the second half": (
        lambda data: data[: len(CONTENT) // 2] + bytes(len(CONTENT) // 2) + data[len(CONTENT) :],
        "does not match its digest",
    ),
    "zeros to the end": (lambda data: data[:100] + bytes(len(data) - 100), "has no digest at its end"),
    "cut by a byte": (lambda data: data[:-1], "has no digest at its end"),
    "a piece cut out": (lambda data: data[:200] + data[300:], "holds 10,140 bytes and should hold 10,240"),
    "emptied": (lambda data: b"", "is empty"),
    "doubled": (lambda data: data + data, "holds 20,566 bytes"),
    "of an earlier version": (lambda data: data[:-SEAL_BYTES], "has no digest at its end"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_named(path: Path, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    inflict, problem = DAMAGE[kind]
    path.write_bytes(inflict(path.read_bytes()))
    assert not is_intact(path)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    message = record.getMessage()
    assert message.startswith(f"The cache file {path} ") and message.endswith(" It is rebuilt.")
    assert any(part in message for part in problem.split("|")), message


def test_a_directory_in_the_place_of_a_cache_file(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.unlink()
    path.mkdir()
    assert not is_intact(path)
    assert "cannot be read (Is a directory)" in caplog.text


def test_large_files_are_announced(
    path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(cache_files, "ANNOUNCED", 1000)
    assert is_intact(path)
    assert f"Verifying the cache file {path}" in caplog.text


def test_old_temporary_files_are_removed(path: Path) -> None:
    """Earlier versions left temporary files without a lock. Such files are removed when they are a day old."""
    folder = path.parent
    legacy = ["tmp0a_bcdef", f".prefix-{'0' * 40}.some.host.123.npy"]
    others = ["tmp0a_bcdef.arrow", "notes.npy"]
    for name in [*legacy, *others]:
        (folder / name).touch()
    assert is_intact(path)
    assert {p.name for p in folder.iterdir()} == {path.name, *legacy, *others}
    for name in [*legacy, *others]:
        os.utime(folder / name, (time.time() - 90_000,) * 2)
    assert is_intact(path)
    assert {p.name for p in folder.iterdir()} == {path.name, *others}
