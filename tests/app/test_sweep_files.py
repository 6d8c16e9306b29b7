"""The files of conf/sweeps: each variant at each end of its grid is a fit that the command line takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from app.cli import main
from app.variants import VARIANTS, option_words, variant_keys

FILES = sorted(Path("conf/sweeps").glob("*.yaml"))
NAMES = {"digits", "which_side", "glue", "summarization", "alpaca_mmlu", "domainbed"} | {
    *("dinov2_cifar10", "minilm_cola", "smollm2_instructions", "small_bart_xsum")
}
KEYS = {"base", "set", "variants", "search", "select", "confirm", "trials_per_variant", "prune"}


def content(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(path.read_text())
    return loaded


def arms(sweep: dict[str, Any]) -> list[tuple[str, dict[str, Any], list[float]]]:
    """Each variant's name with its keys and its learning rates."""
    found = []
    for name, value in sweep["variants"].items():
        own = dict(value)
        built_in = own.pop("variant", name)
        rates = own.pop("search", sweep["search"])["model.learning_rate"]
        if (times := own.pop("times_rank", None)) is not None:
            own |= {"model.adapter.rank": 8 * times, "model.adapter.alpha": 16 * times}
        found.append((name, {**variant_keys(built_in), **own}, rates))
    return found


def test_every_sweep_that_is_promised_is_there() -> None:
    assert {path.stem for path in FILES} == NAMES


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_sweep_is_of_fits_that_the_command_line_takes(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = content(path)
    assert sweep.keys() <= KEYS and path.read_text().startswith("# ")
    files = [word for file in sweep.get("base", ["conf/quickstart.yaml"]) for word in ("--config", file)]
    for name, keys, rates in arms(sweep):
        words = option_words({**sweep.get("set", {}), **keys, "model.learning_rate": rates[0]})
        assert main(["fit", *files, *words, "--print_config"]) == 0, name
        printed = yaml.safe_load(capsys.readouterr().out)
        model = printed["model"]["init_args"]
        assert model["learning_rate"] == rates[0] and model["tuning"] == keys["model.tuning"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_sweep_compares_fairly(path: Path) -> None:
    sweep = content(path)
    grids = [rates for _, _, rates in arms(sweep)]
    assert len({len(grid) for grid in grids}) == 1  # the same number of points
    assert all(isinstance(rate, float) for grid in grids for rate in grid)
    assert all(grid == sorted(grid) and len(set(grid)) == len(grid) for grid in grids)
    select, confirm = sweep["select"], sweep["confirm"]
    assert not set(select["seeds"]) & set(confirm["seeds"])
    assert not select["metric"].startswith("test/")
    assert sweep.get("trials_per_variant", len(grids[0])) == len(grids[0])


def test_the_budget_of_one_factor_at_twice_the_rank_is_loras() -> None:
    for path in FILES:
        for name, keys, _ in arms(content(path)):
            if name.startswith("B1") or name.startswith("B6"):
                assert keys["model.adapter.alpha"] == 2 * keys["model.adapter.rank"]


def test_every_variant_of_the_issue_is_built_in() -> None:
    assert {"B", "A", "lora", "lora-fa", "rslora", "lora+", "head", "full", "adalora", "ia3"} == set(VARIANTS)
