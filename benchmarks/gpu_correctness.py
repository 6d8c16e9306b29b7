"""Compare fits on a device with the same fits on the CPU, in every precision (a part of `benchmarks.gpu`).

A section is one fit of a tiny backbone through `main([...])` with these checks:

- `fit`, `predict` and both exports end with exit code 0, and there is one prediction for each row.
- The validation loss equals the loss of the CPU's float32 fit, within a tolerance for the precision.
- The frozen factors are bit-identical to the CPU's factors.
- Most predicted classes equal the CPU's classes. Generated texts are not compared.
- `killed and resumed` (some sections): a fit that is killed with SIGKILL and resumed ends with the weights of an
  uninterrupted fit, within 0.1 % of the largest weight.

The last sections have other fits:

- `nan`: a diverging fit ends with exit code 2, and every checkpoint has finite weights.
- `images, 32-true, ddp`: one process in a process group, on a GPU with NCCL.

The fits have no dropout, since CPU and GPU draw different masks. Data order and augmentation are drawn on the CPU.

    python -m benchmarks.gpu_correctness --device cuda --output docs/results/gpu_correctness.json
"""

from __future__ import annotations

import csv
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.cli import main as onesided
from benchmarks.harness import Deadline, measured, parse, parser, section, table
from tests.backbones import save_backbone
from tests.causal_backbones import save_decoder

BOUNDS = {"32-true": 1e-3, "bf16-mixed": 5e-2, "16-mixed": 2e-2}  # Relative tolerance of the loss.
AGREE = 0.9  # Minimum share of equal predictions.
ANSWERS = {"prediction", "summary", "response"}  # Columns of predictions.csv; each task has one.
NO_DROPOUT = "{hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0}"
IMAGES = [
    "--config=conf/quickstart.yaml",
    "--data.max_train_samples=256",
    "--trainer.max_epochs=2",
    "--trainer.enable_progress_bar=false",
    "--trainer.log_every_n_steps=1",
]


@dataclass(frozen=True)
class Check:
    """Configuration of one section.

    Args:
        family: Key of `Fixtures.words`.
        precision: Precision of the trainer.
        options: Additional options of the fit.
        resumes: If true, also kill and resume the fit.
    """

    family: str
    precision: str
    options: tuple[str, ...] = ()
    resumes: bool = False


BF16 = ("--model.backbone_dtype=bfloat16",)
COMPILED = ("--model.compile=true",)
CHECKS = {
    "images, 32-true": Check("images", "32-true", resumes=True),
    "images, bf16-mixed, bfloat16 backbone": Check("images", "bf16-mixed", BF16, resumes=True),
    "images, 16-mixed": Check("images", "16-mixed"),
    "texts, 32-true": Check("texts", "32-true"),
    "texts, bf16-mixed": Check("texts", "bf16-mixed", resumes=True),
    "instructions, bf16-mixed, bfloat16 backbone, packed": Check(
        "instructions", "bf16-mixed", (*BF16, "--data.packing=true"), resumes=True
    ),
    "images, bf16-mixed, bfloat16 backbone, compiled": Check("images", "bf16-mixed", (*BF16, *COMPILED)),
    "texts, bf16-mixed, bfloat16 backbone, compiled": Check("texts", "bf16-mixed", (*BF16, *COMPILED)),
    "images, bf16-mixed": Check("images", "bf16-mixed"),
    "texts, 16-mixed": Check("texts", "16-mixed"),
    "instructions, 32-true": Check("instructions", "32-true"),
    "instructions, 16-mixed": Check("instructions", "16-mixed"),
    "summaries, 32-true": Check("summaries", "32-true"),
    "summaries, bf16-mixed, bfloat16 backbone": Check("summaries", "bf16-mixed", BF16),
    "summaries, 16-mixed": Check("summaries", "16-mixed"),
    "images, 32-true, ddp": Check("images", "32-true", ("--trainer.strategy=ddp", "--trainer.devices=1")),
}
QUICK = (
    "images, bf16-mixed, bfloat16 backbone",
    "texts, 32-true",
    "instructions, bf16-mixed, bfloat16 backbone, packed",
    "summaries, 16-mixed",
)


class Fixtures:
    """Tiny backbones and data for every family, in one folder."""

    def __init__(self, folder: Path) -> None:
        rng = random.Random(0)
        words = [f"w{i}" for i in range(40)]
        texts = [" ".join([*rng.choices(words, k=rng.randint(2, 9)), ("good", "bad")[i % 2]]) for i in range(80)]
        rows = {
            "texts": [{"sentence": text, "label": ("good", "bad")[i % 2]} for i, text in enumerate(texts)],
            "summaries": [
                {"document": text, "summary": f"the film was {('good', 'bad')[i % 2]} ."}
                for i, text in enumerate(texts)
            ],
            "instructions": [
                {"instruction": f"Say {text}", "input": "", "output": " ".join([text[:3]] * (1 + i % 3))}
                for i, text in enumerate(texts)
            ],
        }
        self.words = {"images": IMAGES}
        backbones = {
            "texts": save_backbone(folder / "roberta", "roberta"),
            "summaries": save_backbone(folder / "bart", "bart", dropout=0.0),
            "instructions": save_decoder(folder / "llama"),
        }
        recipes = {"texts": "text", "summaries": "summary", "instructions": "instructions"}
        family_options = {
            "texts": ["--data.task=null", "--data.text_columns=[sentence]", f"--model.backbone_args={NO_DROPOUT}"],
            "summaries": [],
            "instructions": ["--model.backbone_args={}"],
        }
        for family, backbone in backbones.items():
            data = folder / family
            data.mkdir()
            parts = {"train": rows[family][:56], "validation": rows[family][56:68], "test": rows[family][68:]}
            for split, part in parts.items():
                (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
            self.words[family] = [
                f"--config=tests/conf/{recipes[family]}.yaml",
                f"--data.path={data}",
                f"--model.backbone={backbone}",
                "--model.adapter.dropout=0.0",
                *family_options[family],
            ]
        self.rows = {"images": 200, **{family: 12 for family in backbones}}
        self.pictures = folder / "pictures"
        self._write_pictures()

    def _write_pictures(self) -> None:
        import pyarrow.parquet as pq
        from PIL import Image

        self.pictures.mkdir()
        cells = pq.read_table("app/assets/digits/test.parquet")["image"].to_pylist()[: self.rows["images"]]
        self.rows["images"] = len(cells)
        for i, cell in enumerate(cells):
            Image.open(io.BytesIO(cell["bytes"])).save(self.pictures / f"{i:03}.png")

    def to_predict(self, family: str) -> list[str]:
        """Return the data options of `predict`. Without options, `predict` uses the test split."""
        return [f"--data.predict_path={self.pictures}"] if family == "images" else []


def run(words: Sequence[str], log: Path) -> int:
    """Run one command in this process, append its output to a file, and return the exit code."""
    with log.open("a") as file, redirect_stdout(file), redirect_stderr(file):
        print("$", *words)
        try:
            return onesided(list(words))
        except Exception as error:  # A crash fails this check, but must not end the benchmark.
            print(f"{type(error).__name__}: {error}")
            return 1


class Fit:
    """A finished fit, with its predictions.

    Args:
        fixtures: Data and backbones.
        check: Configuration of the fit.
        device: `cpu` or `cuda`.
        folder: Folder of the run.
    """

    def __init__(self, fixtures: Fixtures, check: Check, device: str, folder: Path) -> None:
        self.check, self.run_directory = check, folder / "version_0"
        self.words = [
            *fixtures.words[check.family],
            f"--trainer.accelerator={device}",
            f"--trainer.precision={check.precision}",
            f"--trainer.default_root_dir={folder}",
            "--test_after_fit=false",
            *check.options,
        ]
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "log.txt"
        self.fit_code = run(["fit", *self.words], self.log)
        last = self.run_directory / "checkpoints" / "last.ckpt"
        predict = ["predict", *self.words, f"--ckpt_path={last}", *fixtures.to_predict(check.family)]
        self.predict_code = run(predict, self.log)

    def weights(self) -> dict[str, Tensor]:
        """Return the tensors of the last checkpoint, on the CPU."""
        path = self.run_directory / "checkpoints" / "last.ckpt"
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        return state

    def loss(self) -> float:
        """Return the validation loss after the last epoch."""
        return float(json.loads((self.run_directory / "metrics.json").read_text())["val/loss"])

    def predictions(self) -> list[str]:
        """Return one prediction for each row."""
        with (self.run_directory / "predictions.csv").open(newline="") as file:
            rows = csv.DictReader(file)
            (column,) = ANSWERS & set(rows.fieldnames or ())
            return [row[column] for row in rows]


def compare(fixtures: Fixtures, check: Check, reference: Fit, device: str, folder: Path) -> list[dict[str, Any]]:
    """Run a fit and return the results of its checks: `name`, `passed`, `figure`."""
    fit = Fit(fixtures, check, device, folder / "fit")
    results = [_code("fit", fit.fit_code), _code("predict", fit.predict_code)]
    if fit.fit_code:
        return [*results, {"name": "log", "passed": False, "figure": fit.log.read_text()[-2000:]}]
    difference = abs(fit.loss() - reference.loss()) / abs(reference.loss())
    bound = BOUNDS[check.precision]
    results.append({"name": f"loss within {bound:g}", "passed": difference <= bound, "figure": difference})
    expected, weights = reference.weights(), fit.weights()
    frozen = [name for name in expected if name.endswith(".A")]  # Every fit here trains B.
    identical = bool(frozen) and all(torch.equal(expected[name], weights[name]) for name in frozen)
    results.append({"name": "frozen factors identical", "passed": identical, "figure": len(frozen)})
    if not fit.predict_code:
        predictions, expected_predictions = fit.predictions(), reference.predictions()
        agree = sum(a == b for a, b in zip(predictions, expected_predictions, strict=False)) / len(expected_predictions)
        is_complete = len(predictions) == fixtures.rows[check.family]
        generates = check.family in ("summaries", "instructions")  # Generated texts diverge at the first near tie.
        results.append({"name": "rows predicted", "passed": is_complete, "figure": len(predictions)})
        results.append({"name": "predictions like the CPU's", "passed": generates or agree >= AGREE, "figure": agree})
    for form in ("merged", "peft"):
        target = folder / form
        results.append(
            _code(form, run(["export", str(fit.run_directory), "--format", form, "--output", str(target)], fit.log))
        )
    if check.resumes:
        results.append(killed_and_resumed(fit, folder / "killed"))
    return results


def _code(name: str, code: int, expected: int = 0) -> dict[str, Any]:
    return {"name": name, "passed": code == expected, "figure": code}


def killed_and_resumed(fit: Fit, folder: Path) -> dict[str, Any]:
    """Kill the same fit after its first checkpoint, resume the fit, and compare the final weights."""
    root = [word for word in fit.words if not word.startswith("--trainer.default_root_dir")]
    words = ["fit", *root, f"--trainer.default_root_dir={folder}", "--checkpoint.last_every_n_steps=2"]
    last = folder / "version_0" / "checkpoints" / "last.ckpt"
    process = subprocess.Popen(
        [sys.executable, "main.py", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    end = time.monotonic() + 120
    while process.poll() is None and not last.exists() and time.monotonic() < end:
        time.sleep(0.02)
    killed = process.poll() is None
    if killed:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    code = run([*words, "--ckpt_path=last"], fit.log)
    if code or not killed:
        return {"name": "killed and resumed", "passed": False, "figure": f"killed: {killed}, exit code {code}"}
    expected = fit.weights()
    resumed: dict[str, Tensor] = torch.load(last, map_location="cpu", weights_only=True)["state_dict"]
    distance = max(float((resumed[n] - t).abs().max()) for n, t in expected.items() if t.is_floating_point())
    largest = max(float(t.abs().max()) for t in expected.values() if t.is_floating_point())
    # A GPU may sum in another order, so the weights need not be bit-identical.
    return {"name": "killed and resumed", "passed": distance <= 1e-3 * largest, "figure": distance}


def diverges(fixtures: Fixtures, device: str, folder: Path) -> list[dict[str, Any]]:
    """Run a fit that diverges, and check the exit code and the checkpoints."""
    log = folder / "log.txt"
    words = ["fit", *fixtures.words["texts"], f"--trainer.accelerator={device}", "--trainer.precision=16-mixed"]
    code = run([*words, f"--trainer.default_root_dir={folder}", "--model.learning_rate=1e30"], log)
    checkpoints = list(folder.rglob("*.ckpt"))
    finite = all(
        t.isfinite().all()
        for path in checkpoints
        for t in torch.load(path, map_location="cpu", weights_only=True)["state_dict"].values()
        if t.is_floating_point()
    )
    return [_code("ends with 2", code, 2), {"name": "checkpoints finite", "passed": finite, "figure": len(checkpoints)}]


def main(words: Sequence[str] | None = None) -> None:
    """Run the checks until the budget is spent, print and write."""
    arguments = parse(parser(__doc__, rounds=1, quick_rounds=1, device=True), words)
    deadline = Deadline(arguments.budget)
    checks = {name: check for name, check in CHECKS.items() if name in QUICK or not arguments.quick}
    if arguments.quick:
        checks["images, bf16-mixed, bfloat16 backbone"] = Check("images", "bf16-mixed", BF16, resumes=True)
    results: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        fixtures = Fixtures(folder)
        references: dict[str, Fit] = {}
        for number, (name, check) in enumerate([*checks.items(), ("nan", None)]):
            record = measured(arguments, name)
            if record is None:
                if deadline.passed(name):
                    continue
                with section(arguments, name) as record:
                    started = time.monotonic()
                    check_folder = folder / f"check_{number}"
                    check_folder.mkdir()
                    if check is None:
                        record["checks"] = diverges(fixtures, arguments.device, check_folder)
                    else:
                        if check.family not in references:
                            plain = Check(check.family, "32-true")
                            references[check.family] = Fit(fixtures, plain, "cpu", folder / check.family / "cpu")
                            if references[check.family].fit_code:
                                sys.exit(f"The CPU's fit failed:\n{references[check.family].log.read_text()[-3000:]}")
                        reference = references[check.family]
                        record["checks"] = compare(fixtures, check, reference, arguments.device, check_folder)
                    record["section_seconds"] = time.monotonic() - started
            results[name] = record["checks"]
    rows = [
        [name, check["name"], "yes" if check["passed"] else "NO", str(check["figure"])[-200:]]
        for name, checks_of in results.items()
        for check in checks_of
    ]
    table(f"Correctness on {arguments.device}", ["fit", "check", "passed", "figure"], rows)
    deadline.exit()


if __name__ == "__main__":
    main()
