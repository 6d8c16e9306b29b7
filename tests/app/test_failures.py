"""Errors that a user can fix, and defects."""

from __future__ import annotations

from typing import Any

import pytest

from app.failures import bad_input


@pytest.mark.parametrize(
    ("module", "is_the_users"), [("lightning.pytorch.trainer", True), ("lightning_lookalike", False)]
)
def test_the_module_that_raises_decides_and_not_the_folder_of_its_file(module: str, is_the_users: bool) -> None:
    names: dict[str, Any] = {"__name__": module}
    exec(compile("def check(): raise ValueError('no')", "/home/me/lightning/project/data.py", "exec"), names)
    with pytest.raises(ValueError, match="no") as raised:
        names["check"]()
    assert (bad_input(raised.value) is raised.value) == is_the_users
