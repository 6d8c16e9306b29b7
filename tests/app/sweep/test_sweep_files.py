"""The files of conf/sweeps: every variant is a fit that the command line accepts."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

from app.cli import parse_fit, restricted_imports
from app.config.yaml_files import checked_yaml
from app.sweep.check import fit_arguments
from app.sweep.plan import Plan, grid_points, read_plan

FILES = sorted(Path("conf/sweeps").glob("*.yaml"))
OWN_DATA = ("images", "texts", "summaries", "chats")  # recipes for data of the user
OPEN = ("learning_rate", "which_side")  # files that leave the recipe to the command line


@pytest.fixture(autouse=True)
def as_in_main() -> Iterator[None]:
    with restricted_imports(), checked_yaml():
        yield


@cache
def plan(path: Path) -> Plan:
    return read_plan(str(path), parse_fit, base=["conf/quickstart.yaml"] if path.stem in OPEN else [])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_command_line_accepts_every_fit_of_a_sweep(path: Path) -> None:
    assert path.read_text().startswith("# ")
    sweep = plan(path)
    assert not sweep.notes  # no variant is left out
    for variant in sweep.variants:
        point = grid_points(variant)[0]
        config = parse_fit(fit_arguments(sweep, variant, point, sweep.select_seeds[0])[1:])
        model = config.model.init_args
        assert model.learning_rate == point["model.learning_rate"], variant.name
        assert model.tuning == variant.keys["model.tuning"], variant.name
        # LoRA's number of parameters: twice the rank at the same scale
        if variant.name.startswith("B") and variant.name != "B":
            assert model.adapter.alpha == 2 * model.adapter.rank, variant.name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_all_variants_of_a_sweep_have_equally_many_trials(path: Path) -> None:
    sweep = plan(path)
    rates = [variant.search["model.learning_rate"] for variant in sweep.variants]
    assert all(isinstance(rate, float) for grid in rates for rate in (grid if isinstance(grid, tuple) else ()))
    assert {len(grid_points(variant)) for variant in sweep.variants} == {len(grid_points(sweep.variants[0]))}
    assert sweep.trials_per_variant in (None, len(grid_points(sweep.variants[0])))
    if len(sweep.variants) > 1:
        assert len(sweep.confirm_seeds) >= 3


@pytest.mark.parametrize(
    ("sweep", "recipe"),
    [
        ("images", "images"),
        *(("learning_rate", name) for name in (*OWN_DATA, "quickstart")),
    ],
)
def test_a_search_for_your_own_data_tries_the_default_of_the_recipe(sweep: str, recipe: str) -> None:
    search, model = (
        yaml.safe_load(Path(f"conf/{path}.yaml").read_text())[key]
        for path, key in ((f"sweeps/{sweep}", "search"), (recipe, "model"))
    )
    assert model["init_args"]["learning_rate"] in search["model.learning_rate"]


def test_which_side_works_with_any_recipe() -> None:
    written = yaml.safe_load(Path("conf/sweeps/which_side.yaml").read_text())
    assert "base" not in written
    sweep = plan(Path("conf/sweeps/which_side.yaml"))
    assert [variant.name for variant in sweep.variants] == ["B", "B2r", "A", "lora", "head"]
    assert (sweep.metric, sweep.mode, sweep.report) == ("val/loss", "min", ("test/loss",))  # from the recipe
    bart = read_plan("conf/sweeps/which_side.yaml", parse_fit, ["conf/bart_xsum.yaml"], ["data.path=app/assets/digits"])
    assert [variant.name for variant in bart.variants] == ["B", "B2r", "A", "lora"]
    assert bart.variants[1].keys["model.adapter.rank"] == 32
    assert bart.variants[1].keys["model.adapter.alpha"] == 64
