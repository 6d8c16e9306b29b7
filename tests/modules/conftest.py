"""Tiny backbones for all tests of modules: bare ones, and tasks over them."""

from __future__ import annotations

import pytest

from tests.support.bare_backbones import BACKBONES, FAMILIES, Backbone
from tests.support.tasks import TaskFactory


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> TaskFactory:
    """Build a task by the name of its family: `tasks("roberta", tuning="head")`."""
    return TaskFactory(tmp_path_factory.mktemp("families"))


@pytest.fixture(params=[f.__name__ for f in FAMILIES])
def backbone(request: pytest.FixtureRequest, deterministic: None) -> Backbone:
    """Each family in turn; `parametrize("backbone", ["vit"], indirect=True)` for one of them, or a variant."""
    return BACKBONES[request.param]()
