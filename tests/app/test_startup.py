"""Modules that a process imports beyond those of Lightning, when it has printed help and when it has trained."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.app.conftest import CommandLine
from tests.conftest import CLASSES, ROOT, colour_image, png

# what a fit does not use unless it tests, writes summaries or is compared with another program
LATE = {"matplotlib", "nltk", "peft", "rouge_score", "sklearn"}
TEXTS = {"datasets", "tokenizers", "transformers"}
IMAGES = {"timm", "datamodules.sources.images", "modules.backbones.timm_backbone"}
SCRIPT = """
import json, sys
import lightning.pytorch
with_lightning = set(sys.modules)
from app.cli import main
for words in json.loads(sys.argv[1]):
    assert main(words) == 0
    print(json.dumps(list(set(sys.modules) - with_lightning)))
"""


def imported(*commands: list[str]) -> list[set[str]]:
    """Return the modules that a fresh process has imported after each command, without those of Lightning."""
    words = [sys.executable, "-c", SCRIPT, json.dumps(commands)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return [set(json.loads(line)) for line in done.stdout.splitlines() if line.startswith('["')]


def test_help_and_a_run_on_images_import_nothing_else(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for i in range(8):
            (folder / f"{i}.png").write_bytes(png(colour_image(label, rng)))
    fit = CommandLine(tmp_path / "runs", tmp_path / "images").words("fit", "--trainer.max_steps=1")
    helped, fitted = imported(["fit", "--help"], fit)
    others = {"pandas", "scipy", "torchvision", "tensorboard", "pyarrow", "huggingface_hub"}
    assert helped & (LATE | TEXTS | IMAGES | others) == set()
    assert {"timm", "tensorboard"} < fitted  # it has trained, and logged
    assert fitted & (LATE | TEXTS | {"scipy"}) == set()


def test_a_page_of_help_imports_no_optional_package_of_torchmetrics() -> None:
    script = """
import runpy, sys
sys.argv = ["main.py", "fit", "--help"]
assert runpy.run_path("main.py")["main"]() == 0
print(sorted({"matplotlib", "nltk", "scipy", "torchvision", "transformers"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--trainer.max_epochs" in done.stdout


def test_torchmetrics_knows_every_package_and_garbage_is_collected_after_the_imports() -> None:
    script = """
import gc, main
from torchmetrics.utilities import imports
assert imports._SCIPY_AVAILABLE
assert gc.isenabled() and gc.get_freeze_count() > 100_000
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_a_run_on_texts_imports_nothing_for_images(text_cli: CommandLine) -> None:
    (fitted,) = imported(text_cli.words("fit", "--trainer.max_steps=1"))
    assert {"datasets", "tensorboard"} < fitted
    assert fitted & (LATE | IMAGES) == set()
