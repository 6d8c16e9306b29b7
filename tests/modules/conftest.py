"""Fixtures of tests of modules: tiny backbones, and tasks on tiny backbones."""

from __future__ import annotations

import pytest

from tests.support.bare_backbones import BACKBONES, FAMILIES, Backbone
from tests.support.tasks import TaskFactory


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> TaskFactory:
    """Return a factory of tasks by the name of their family, as in `tasks("roberta", tuning="head")`."""
    return TaskFactory(tmp_path_factory.mktemp("families"))


@pytest.fixture(params=[f.__name__ for f in FAMILIES])
def backbone(request: pytest.FixtureRequest, deterministic: None) -> Backbone:
    """Return a backbone of each family in turn. `parametrize("backbone", ["vit"], indirect=True)` selects families."""
    return BACKBONES[request.param]()
