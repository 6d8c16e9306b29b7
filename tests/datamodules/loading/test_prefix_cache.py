"""Hidden states on disk: rows come back as they were, padded and packed, in every dtype, in every process."""

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
    """Tokens that say which row and position they are of: 10·row + position."""

    def __len__(self) -> int:
        return len(LENGTHS)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = [10 * index + position for position in range(int(LENGTHS[index]))]
        return {"input_ids": ids, "labels": ids, "index": index}


class Prefix:
    """Gives each token its own number in every entry, and rubbish where there is padding."""

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
    made = torch.zeros(len(packs), tokens)
    for values, pack in zip(made, packs, strict=True):
        numbers = [10 * row + position for row in pack for position in range(int(LENGTHS[row]))]
        values[: len(numbers)] = torch.tensor(numbers, dtype=torch.float32)
    return made[..., None].expand(-1, -1, WIDTH)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_come_back(folder: Path, dtype: torch.dtype) -> None:
    states = filled(Prefix(dtype))
    assert states.dtype == dtype
    for packs, tokens in ([[[0], [1], [2], [3], [4]], 5], [[[2]], 1], [[[4], [0]], 7], [[[0, 2, 4], [3]], 6]):
        batch = states.batch(packs, tokens)
        assert batch.dtype == dtype
        assert torch.equal(batch.float(), expected(packs, tokens))
    again = pickle.loads(pickle.dumps(states))  # as a worker that does not fork has it
    assert torch.equal(again.batch([[3]]), states.batch([[3]]))
    (file,) = folder.iterdir()
    array = np.load(file, mmap_mode="r")  # any program can read it
    assert array.shape == (int(LENGTHS.sum()), WIDTH)
    assert array.dtype == {torch.bfloat16: np.int16, torch.float16: np.float16}.get(dtype, np.float32)


def test_a_second_filling_reads(capsys: pytest.CaptureFixture[str]) -> None:
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


def test_batches_have_hidden_states_for_tokens() -> None:
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
def test_a_damaged_file_is_written_anew(content: bytes | None) -> None:
    prefix = Prefix(torch.float32)
    states = filled(prefix)
    whole = states.path.read_bytes()
    states.path.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:] if content is None else content)
    assert torch.equal(filled(prefix).batch([[1]]), states.batch([[1]]))
    assert prefix.calls == 6


def test_a_file_cut_short_under_a_run() -> None:
    states = filled(Prefix(torch.float32))
    with states.path.open("r+b") as file:
        file.truncate(states.path.stat().st_size // 2)
    with pytest.raises(DataError, match=r"data\.cache_prefix: .* has been cut short; remove it and run again"):
        states.batch([[row] for row in range(5)])


def test_a_file_removed_under_a_run() -> None:
    states = filled(Prefix(torch.float32))
    states.path.unlink()
    with pytest.raises(DataError, match=r"prefix-\w+\.npy can no longer be read \(.*\); run again"):
        states.batch([[0]])


def test_padding_at_the_left() -> None:
    with pytest.raises(DataError, match=r"data\.cache_prefix: is for texts that are padded at the right"):
        filled(Prefix(torch.float32), side="left")
    batches = WithHidden(PadSequences(0, "left"), filled(Prefix(torch.float32)))
    assert torch.equal(batches([Rows()[1], Rows()[3]])["hidden"], expected([[1], [3]], 5))  # without padding
    with pytest.raises(DataError, match=r"padding_side: right in tokenizer_config\.json"):
        batches([Rows()[0], Rows()[1]])


def test_each_batch_is_a_beat() -> None:
    beats: list[None] = []
    filled(Prefix(torch.float32), beat=lambda: beats.append(None))
    assert len(beats) == 3


def test_an_error_in_a_worker_is_its_message_alone() -> None:
    try:
        try:
            raise OSError("cut")
        except OSError as error:
            raise DataError("data.path: an image is broken.") from error
    except DataError:
        told = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(DataError, match=r"^data\.path: an image is broken\.$"):
        pickle.loads(pickle.dumps(told)).reraise()


def test_nothing_is_left_of_a_filling_that_failed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
