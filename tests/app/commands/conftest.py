"""Finished runs for the commands that analyse them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from tests.app.conftest import CommandLine
from tests.conftest import ROOT
from tests.support.pages import check_single_file

QUICK = ("--trainer.max_epochs=1", "--trainer.logger=false", "--model.learning_rate=0.02")
VARIANTS = {
    "both": ("--model.adapter.train=both",),
    "both_other_seed": ("--model.adapter.train=both", "--model.adapter.seed=1"),
    "b": (),
    "b_other_rate": ("--model.learning_rate=0.01",),
    "b_other_rank": ("--model.adapter.rank=2", "--model.adapter.alpha=4"),
    "head": ("--model.tuning=head",),
    "other_backbone": ("--seed_everything=1",),
}


@pytest.fixture(scope="session")
def finished_runs(tmp_path_factory: pytest.TempPathFactory, parquet_path: Path) -> dict[str, Path]:
    """Return one finished run of each of VARIANTS, on one random ViT. Tests copy a run before they change it."""
    root = tmp_path_factory.mktemp("finished_runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for name, options in VARIANTS.items():
            cli = CommandLine(root / name, parquet_path)
            assert cli("fit", *QUICK, *options) == 0
    return {name: root / name / "version_0" for name in VARIANTS}


def assert_page_has_pictures(folder: Path, *names: str) -> str:
    """Check that report.html is self-contained and has these pictures, which also exist as PNG. Return its HTML."""
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert len(check_single_file(page)) == len(names)
    assert sorted(path.stem for path in folder.glob("*.png")) == sorted(names)
    for name in names:
        Image.open(folder / f"{name}.png").verify()
    captions = re.findall(r"<figcaption><b>(.+?)</b>(.+?)</figcaption>", page, flags=re.DOTALL)
    assert len(captions) == len(names)
    for _, reading in captions:
        # how to read the picture, and what to look for
        assert len(re.findall(r"\.(?=\s|$)", re.sub(r"et al\.", "", reading))) == 2
    return page
