"""Cached hidden states: rows are read back unchanged, padded or packed, in every dtype and process."""

from __future__ import annotations

import contextlib
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch import Tensor
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader

from datamodules.errors import DataError
from datamodules.loading import prefix_cache
from datamodules.loading.prefix_cache import HiddenStates, WithHidden, filling_order, hidden_states
from datamodules.tokens.packing import PadPacks, PadSequences

LENGTHS = torch.tensor([3, 5, 1, 5, 2])
WIDTH = 4


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows of tokens that encode their row and position: 10·row + position."""

    def __len__(self) -> int:
        return len(LENGTHS)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = [10 * index + position for position in range(int(LENGTHS[index]))]
        return {"input_ids": ids, "labels": ids, "index": index}


class Prefix:
    """Stand in for a frozen prefix: every entry of a token's hidden state is the token's id, and -7 for padding."""

    key = "a prefix"

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.calls = dtype, 0

    def states(self, batch: dict[str, Tensor]) -> Tensor:
        self.calls += 1
        numbers = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -7)
        return numbers[..., None].expand(-1, -1, WIDTH).to(self.dtype)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    return tmp_path / "onesided"


def filled(prefix: Prefix, rows_key: str = "rows", side: str = "right", beat: Any = lambda: None) -> HiddenStates:
    strategy = SimpleNamespace(batch_to_device=lambda batch: batch)
    trainer: Any = SimpleNamespace(strategy=strategy, is_global_zero=True, local_rank=0)
    order = filling_order(LENGTHS).tolist()
    loader = DataLoader(Rows(), 2, sampler=order, collate_fn=PadSequences(0, side))
    return hidden_states(trainer, prefix, loader, LENGTHS, rows_key, "train", beat)


def expected(packs: list[list[int]], tokens: int) -> Tensor:
    states = torch.zeros(len(packs), tokens)
    for values, pack in zip(states, packs, strict=True):
        numbers = [10 * row + position for row in pack for position in range(int(LENGTHS[row]))]
        values[: len(numbers)] = torch.tensor(numbers, dtype=torch.float32)
    return states[..., None].expand(-1, -1, WIDTH)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_read_back_unchanged(folder: Path, dtype: torch.dtype) -> None:
    states = filled(Prefix(dtype))
    assert states.dtype == dtype
    for packs, tokens in ([[[0], [1], [2], [3], [4]], 5], [[[2]], 1], [[[4], [0]], 7], [[[0, 2, 4], [3]], 6]):
        batch = states.batch(packs, tokens)
        assert batch.dtype == dtype
        assert torch.equal(batch.float(), expected(packs, tokens))
    unpickled = pickle.loads(pickle.dumps(states))  # as in a worker process that is spawned
    assert torch.equal(unpickled.batch([[3]]), states.batch([[3]]))
    (file,) = folder.iterdir()
    array = np.load(file, mmap_mode="r")  # NumPy can read the file
    assert array.shape == (int(LENGTHS.sum()), WIDTH)
    assert array.dtype == {torch.bfloat16: np.int16, torch.float16: np.float16}.get(dtype, np.float32)


def test_a_second_run_reads_the_cache(capsys: pytest.CaptureFixture[str]) -> None:
    prefix = Prefix(torch.float32)
    filled(prefix)
    assert prefix.calls == 3
    assert "output for 5 rows of train (" in capsys.readouterr().err
    filled(prefix)
    assert prefix.calls == 3
    assert "read from" in capsys.readouterr().err
    filled(prefix, "others")
    prefix.key = "another"
    filled(prefix)
    assert prefix.calls == 9


def test_batches_have_hidden_states_instead_of_tokens() -> None:
    states = filled(Prefix(torch.float32))
    rows = [Rows()[i] for i in (0, 3)]
    batch = WithHidden(PadSequences(0), states)(rows)
    assert set(batch) == {"hidden", "labels", "attention_mask", "index"}
    assert torch.equal(batch["hidden"], expected([[0], [3]], 5))
    assert batch["attention_mask"].sum(1).tolist() == [3, 5]
    packs = [[Rows()[0], Rows()[4]], [Rows()[2]]]
    packed = WithHidden(PadPacks(0), states)(packs)
    assert set(packed) == {"hidden", "labels", "position_ids"}
    assert torch.equal(packed["hidden"], expected([[0, 4], [2]], 5))


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"nothing of the kind", None])
def test_a_damaged_file_is_rebuilt(content: bytes | None) -> None:
    prefix = Prefix(torch.float32)
    states = filled(prefix)
    content_before = states.path.read_bytes()
    states.path.write_bytes(
        content_before[:200] + bytes([content_before[200] ^ 1]) + content_before[201:] if content is None else content
    )
    assert torch.equal(filled(prefix).batch([[1]]), states.batch([[1]]))
    assert prefix.calls == 6


def test_a_file_truncated_during_a_run_is_refused() -> None:
    states = filled(Prefix(torch.float32))
    with states.path.open("r+b") as file:
        file.truncate(states.path.stat().st_size // 2)
    with pytest.raises(DataError, match=r"data\.cache_prefix: .* is truncated\. Remove the file and run"):
        states.batch([[row] for row in range(5)])


def test_a_file_removed_during_a_run_is_refused() -> None:
    states = filled(Prefix(torch.float32))
    states.path.unlink()
    with pytest.raises(DataError, match=r"prefix-\w+\.npy can no longer be read \(.*\)\. Run the command again"):
        states.batch([[0]])


def test_padding_on_the_left_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.cache_prefix: the cache needs texts that are padded at the right"):
        filled(Prefix(torch.float32), side="left")
    batches = WithHidden(PadSequences(0, "left"), filled(Prefix(torch.float32)))
    # rows of equal length need no padding
    assert torch.equal(batches([Rows()[1], Rows()[3]])["hidden"], expected([[1], [3]], 5))
    with pytest.raises(DataError, match=r"padding_side: right in tokenizer_config\.json"):
        batches([Rows()[0], Rows()[1]])


def test_progress_is_reported_after_each_batch() -> None:
    beats: list[None] = []
    filled(Prefix(torch.float32), beat=lambda: beats.append(None))
    assert len(beats) == 3


def test_an_error_in_a_worker_process_keeps_its_message_alone() -> None:
    try:
        try:
            raise OSError("cut")
        except OSError as error:
            raise DataError("data.path: an image is broken.") from error
    except DataError:
        wrapper = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(DataError, match=r"^data\.path: an image is broken\.$"):
        pickle.loads(pickle.dumps(wrapper)).reraise()


def test_a_failed_run_leaves_no_cache_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = Prefix(torch.float32)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prefix, "states", interrupted(prefix))
        filled(prefix)
    assert not list(folder.iterdir())
    with monkeypatch.context() as patch, pytest.raises(DataError, match=r"0\.00 GiB left, and 5 rows of train"):
        patch.setattr(prefix_cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
        filled(prefix)
    assert not list(folder.iterdir())
    with contextlib.suppress(OSError):
        folder.rmdir()
    folder.write_text("a file in its place")
    with pytest.raises(DataError, match=r"could not be written .*free some space, set HF_DATASETS_CACHE"):
        filled(prefix)


def interrupted(prefix: Prefix) -> Any:
    original = prefix.states

    def states(batch: dict[str, Tensor]) -> Tensor:
        if prefix.calls == 2:
            raise KeyboardInterrupt
        return original(batch)

    return states
