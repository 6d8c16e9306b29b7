"""Settings of every test (no hub, no color, fixed width, one thread), and the processes that run the tests."""

from __future__ import annotations

import gc
import os
import tempfile
from pathlib import Path

import pytest

os.environ.update(
    OMP_NUM_THREADS="1",  # a second thread would slow down such small models, and every core runs other tests
    HF_HUB_OFFLINE="1",
    HF_DATASETS_CACHE=tempfile.mkdtemp(prefix="onesided-tests-"),
    COLUMNS="160",
    NO_COLOR="1",
    CUDA_VISIBLE_DEVICES="",
)
ROOT = Path(__file__).parents[1]


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Use every core for folders, and this process alone for files or keywords: each worker imports everything."""
    chosen = config.option.keyword or any(not Path(arg).is_dir() for arg in config.args)
    if chosen:
        return 0
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pytest_configure(config: pytest.Config) -> None:
    """Load the fixtures, and with them torch, unless this process only starts the workers.

    Imports and collected tests are two million objects that stay. Garbage collection would double the time of both.
    """
    if config.option.dist == "no" or hasattr(config, "workerinput"):
        gc.disable()
        config.pluginmanager.import_plugin("tests.fixtures")


def pytest_collection_finish() -> None:
    """Collect garbage again, but more rarely, and never imported modules and collected tests."""
    gc.freeze()
    gc.set_threshold(20_000)
    gc.enable()
