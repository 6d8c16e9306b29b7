"""Imports: modules that help and training import beyond those of Lightning."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.app.conftest import CommandLine
from tests.conftest import ROOT
from tests.support.small_data import CLASSES, colour_image, png

# a fit needs these modules only to test, to score summaries or to compare with other programs
LATE = {"matplotlib", "nltk", "peft", "rouge_score", "sklearn"}
TEXTS = {"datasets", "tokenizers", "transformers"}
IMAGES = {"timm", "datamodules.sources.images", "modules.backbones.timm_backbone"}
SCRIPT = """
import gc, json, os, sys
import lightning.pytorch
from torchmetrics.utilities import imports
with_lightning = set(sys.modules)
from main import main
assert imports._SCIPY_AVAILABLE  # torchmetrics knows every package
assert gc.isenabled() and gc.get_freeze_count() > 100_000  # garbage is collected again after the imports
for group in json.loads(sys.argv[1]):
    if os.fork() == 0:
        for words in group:
            assert main(words) == 0
            print(json.dumps(list(set(sys.modules) - with_lightning)), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


def imported(*groups: list[list[str]]) -> list[set[str]]:
    """Return the modules beyond Lightning's after each command. Each group of commands has a new process."""
    words = [sys.executable, "-c", SCRIPT, json.dumps(groups)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return [set(json.loads(line)) for line in done.stdout.splitlines() if line.startswith('["')]


@pytest.mark.slow
def test_help_and_runs_import_nothing_else(tmp_path: Path, text_cli: CommandLine) -> None:
    rng = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for i in range(8):
            (folder / f"{i}.png").write_bytes(png(colour_image(label, rng)))
    short = ("--trainer.max_steps=1", "--trainer.limit_val_batches=1")
    fit = CommandLine(tmp_path / "runs", tmp_path / "images").words("fit", *short)
    helped, images, texts = imported([["fit", "--help"], fit], [text_cli.words("fit", *short)])
    others = {"pandas", "scipy", "torchvision", "tensorboard", "pyarrow", "huggingface_hub"}
    assert helped & (LATE | TEXTS | IMAGES | others) == set()
    assert {"timm", "tensorboard"} < images  # the fit has trained and logged
    assert images & (LATE | TEXTS | {"scipy"}) == set()
    assert {"datasets", "tensorboard"} < texts
    assert texts & (LATE | IMAGES) == set()
