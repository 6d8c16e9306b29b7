"""Atomic writes: a file or directory is complete or absent. Stale temporary files of killed processes are removed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from datamodules import atomic
from datamodules.atomic import WriteError, atomic_directory, atomic_write, atomic_write_text, remove_stale
from tests.conftest import ROOT
from tests.support.disks import no_file_larger_than, no_room_for

WRITER = """
import sys
from pathlib import Path
from datamodules.atomic import atomic_directory, atomic_write
with atomic_write(Path(sys.argv[1]) / "file") as file, atomic_directory(Path(sys.argv[1]) / "folder") as folder:
    file.write(b"half")
    (folder / "part").write_text("half")
    print("writing", flush=True)
    sys.stdin.read()
"""

FORKING = """
import os, sys, time
from pathlib import Path
from datamodules.atomic import atomic_directory, atomic_write
with atomic_write(Path(sys.argv[1]) / "file"), atomic_directory(Path(sys.argv[1]) / "folder"):
    if os.fork() == 0:  # whose handles are closed by now
        print(os.getpid(), flush=True)
    time.sleep(60)
"""


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_write(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    with atomic_write(path) as file:
        file.write(memoryview(b"other").cast("B"))
        assert path.read_bytes() == b"new"
    assert path.read_bytes() == b"other"
    assert names(tmp_path) == {"file"}
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("error", [ValueError("a defect"), KeyboardInterrupt(), OSError(errno.EIO, "of another file")])
def test_an_error_inside_the_context_is_raised_unchanged(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(type(error)) as caught, atomic_write(path) as file:
        file.write(b"new")
        raise error
    assert caught.value is error
    # a directory's OSError becomes a WriteError, since a library may not name the file
    kind = WriteError if isinstance(error, OSError) else type(error)
    with pytest.raises(kind), atomic_directory(tmp_path / "folder"):
        raise error
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == {"file"}


def test_a_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with no_file_larger_than(1000):
        with (
            pytest.raises(WriteError, match=r"file could not be written \(File too large\)"),
            atomic_write(path) as file,
        ):
            file.write(bytes(2000))
        with pytest.raises(WriteError, match="File too large"), atomic_write(path) as file:
            try:
                file.write(bytes(2000))
            except OSError:  # as torch's zip writer does
                raise RuntimeError("unexpected position") from None
        with pytest.raises(WriteError, match="File too large"), atomic_write_text(path) as text:
            text.write("x" * 2000)
        with pytest.raises(WriteError, match="folder could not"), atomic_directory(tmp_path / "folder") as folder:
            (folder / "part").write_bytes(bytes(2000))
    with no_room_for(".file."), pytest.raises(WriteError, match="No space left on device"), atomic_write(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == {"file"}


@pytest.mark.parametrize("place", ["missing/file", "file/below"])
def test_a_path_without_a_parent_directory_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=f"{place} could not be written"), atomic_write(tmp_path / place):
        pass


def test_no_write_follows_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.write_bytes(b"mine")
    inside.mkdir()
    tokens = iter(["0" * 16, "1" * 16])
    monkeypatch.setattr(atomic.secrets, "token_hex", lambda _: next(tokens))
    for name in ("file", f".file.{'0' * 16}.tmp"):
        (inside / name).symlink_to(outside)
    with atomic_write(inside / "file") as file:
        file.write(b"the run's")
    assert outside.read_bytes() == b"mine"
    assert names(inside) == {"file"}
    assert not (inside / "file").is_symlink()


def test_a_directory_replaces_an_empty_directory_or_any_with_overwrite(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    with atomic_directory(path) as folder:  # `path` is empty
        (folder / "a").write_text("1")
        (folder / "a").chmod(0o600)
    assert (path / "a").stat().st_mode & 0o777 == 0o666 & path.stat().st_mode
    with pytest.raises(WriteError, match="Directory not empty"), atomic_directory(path):
        pass
    with atomic_directory(path, overwrite=True) as folder:
        (folder / "b").write_text("2")
    assert names(path) == {"b"}
    (tmp_path / "link").symlink_to(path)
    with atomic_directory(tmp_path / "link", overwrite=True):
        pass
    assert names(path) == {"b"}
    assert names(tmp_path) == {"folder", "link"}


def test_a_directory_that_cannot_be_replaced_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, rename = tmp_path / "folder", os.rename
    path.mkdir()
    (path / "old").write_text("1")
    renames = iter([rename, failing_rename, rename])
    monkeypatch.setattr(os, "rename", lambda source, target: next(renames)(source, target))
    with pytest.raises(WriteError, match="No space left on device"), atomic_directory(path, overwrite=True) as folder:
        (folder / "new").write_text("2")
    assert names(path) == {"old"}
    assert names(tmp_path) == {"folder"}


def failing_rename(source: object, target: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_longest_possible_file_name_is_written(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 127)
    with atomic_write(path) as file:
        file.write(b"1")
    assert names(tmp_path) == {path.name}


def test_text_may_have_characters_that_are_not_utf8(tmp_path: Path) -> None:
    with atomic_write_text(tmp_path / "file") as file:
        file.write("ü\udce9\r\n")
    assert (tmp_path / "file").read_bytes() == "ü\\udce9\r\n".encode()


def test_temporary_files_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    words = [sys.executable, "-c", WRITER, str(tmp_path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        process.stdout.readline()
        before = names(tmp_path)
        assert len(before) == 2
        remove_stale(tmp_path)
        with atomic_write(tmp_path / "file") as file:  # while the other process writes too
            file.write(b"whole")
        assert names(tmp_path) == before | {"file"}
        process.send_signal(signal.SIGKILL)
    remove_stale(tmp_path, "another")
    assert names(tmp_path) == before | {"file"}
    with atomic_directory(tmp_path / "folder"):
        pass
    assert len(names(tmp_path)) == 3
    remove_stale(tmp_path)
    assert names(tmp_path) == {"file", "folder"}


def test_a_forked_worker_does_not_hold_the_lock_of_its_parent(tmp_path: Path) -> None:
    """A worker forked during a write outlives a killed parent by some seconds."""
    with subprocess.Popen([sys.executable, "-c", FORKING, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        process.kill()
        process.wait()
        assert len(names(tmp_path)) == 2
        remove_stale(tmp_path)
        assert names(tmp_path) == set()
        os.kill(worker, signal.SIGKILL)  # the worker was still running
