"""Errors that a user can fix, as opposed to defects of the program."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch.distributed as dist
from jsonargparse import Namespace
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader

from app.run.failures import (
    LOADERS,
    bad_input,
    causes,
    construction_error,
    is_caused_by,
    is_caused_by_signal,
    is_peer_lost,
    is_worker_lost,
)
from datamodules.errors import DataError


def raise_in(module: str, error: Exception) -> Exception:
    """Return the error after a module of this name has raised it."""
    names: dict[str, Any] = {"__name__": module, "error": error}
    exec(compile("def fail(): raise error", "/home/me/lightning/project/data.py", "exec"), names)
    with pytest.raises(type(error)) as raised:
        names["fail"]()
    return raised.value


@pytest.mark.parametrize(
    ("module", "is_the_users"), [("lightning.pytorch.trainer", True), ("lightning_lookalike", False)]
)
def test_an_error_is_classified_by_the_module_that_raises_it_not_by_its_folder(module: str, is_the_users: bool) -> None:
    error = raise_in(module, ValueError("no"))
    assert (bad_input(error) is error) == is_the_users


@pytest.mark.parametrize(
    ("module", "error", "is_lost"),
    [
        (LOADERS[0], RuntimeError("any words"), True),
        (LOADERS[1], RuntimeError("any words"), True),
        (LOADERS[0], NotImplementedError("any words"), False),
        ("torch.utils.data._utils.collate", RuntimeError("DataLoader worker"), False),
    ],
)
def test_a_lost_worker_is_recognised_by_class_and_module(module: str, error: Exception, is_lost: bool) -> None:
    raised = raise_in(module, error)
    wrapped = ValueError("wrapped")
    wrapped.__cause__ = raised
    assert is_worker_lost(raised) == is_worker_lost(wrapped) == is_peer_lost(raised) == is_lost
    assert ("num_workers" in str(bad_input(wrapped))) == is_lost


def test_a_killed_worker_is_a_lost_worker() -> None:
    loader: DataLoader[Any] = DataLoader(Killed(), num_workers=1)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError) as raised:
        next(iter(loader))
    assert is_worker_lost(raised.value)


class Killed:
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return index


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (ConnectionResetError(), True),
        (dist.DistNetworkError("any words"), True),
        (RuntimeError("[/x/third_party/gloo/gloo/transport/tcp/pair.cc:561] any words"), True),
        (RuntimeError("Connection closed by peer"), False),
        (ValueError("gloo/transport"), False),
    ],
)
def test_a_lost_peer_is_recognised_by_class_or_transport(error: Exception, is_lost: bool) -> None:
    assert is_peer_lost(error) == is_lost


def test_a_cycle_of_causes_is_followed_once() -> None:
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    assert list(causes(first)) == [first, second]
    assert bad_input(first) is None and not is_caused_by_signal(first)


def test_a_signal_is_found_in_the_context_of_a_later_error() -> None:
    with pytest.raises(KeyError) as raised:
        try:
            raise SIGTERMException
        finally:
            raise KeyError("loader")
    assert is_caused_by_signal(raised.value)
    assert not is_caused_by(raised.value, OSError(32, "Broken pipe"))


def test_the_message_names_the_key_of_a_class_that_cannot_be_created() -> None:
    callback = Namespace(class_path="some.where.Callback", init_args=Namespace(size=3))
    config = Namespace(trainer=Namespace(callbacks=[Namespace(class_path="x.Other"), callback]))
    error = construction_error(config, type("Callback", (), {}), TypeError("size is wrong"))
    assert str(error) == "trainer.callbacks: Callback cannot be created (TypeError: size is wrong)."
    missing = construction_error(config, type("Callback", (), {}), ModuleNotFoundError("no", name="wandb.sdk"))
    assert str(missing).endswith("Install the package: pip install wandb.")
    data_error = DataError("data.path: x is not here.")
    assert construction_error(config, int, data_error) is data_error
