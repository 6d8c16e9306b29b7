"""Report of the data: few optimizer steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.app.conftest import CommandLine


@pytest.mark.parametrize(
    ("options", "warning"),
    [
        ([], "The whole fit has 16 optimizer steps"),  # two epochs of 48 images in batches of 6
        (["--trainer.max_epochs=1", "--data.batch_size=48"], "The whole fit has 1 optimizer step,"),
        (["--trainer.accumulate_grad_batches=4"], "The whole fit has 4 optimizer steps"),
        (["--data.batch_size=1"], None),  # 96 steps
        (["--trainer.max_steps=3"], None),  # the number of steps is intended
    ],
)
def test_few_optimizer_steps_are_warned_about(
    cli: CommandLine, capsys: pytest.CaptureFixture[str], options: list[str], warning: str | None
) -> None:
    assert cli("fit", "--trainer.logger=false", *options) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "optimizer step" in line]
    assert len(lines) == (warning is not None)
    if warning is not None:
        assert warning in lines[0]
        assert "Lower data.batch_size, or raise trainer.max_epochs." in lines[0]
