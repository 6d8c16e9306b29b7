"""Recipes on the user's files with `data.path` alone: texts, images, summaries and chats."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.cli import main
from app.console import escape_controls
from tests.support.refusals import refused
from tests.support.small_data import CLASSES, colour_image, png

Fit = Callable[..., Path]
TINY_VIT = (
    "--model.backbone=vit_tiny_patch16_224",
    "--model.weights=none",
    "--model.image_size=16",
    "--model.backbone_args={patch_size: 4, embed_dim: 32, depth: 1, num_heads: 2}",
    "--data.num_workers=0",
)
TINY = {  # fixture of the backbone, and options, by recipe
    "texts": ("roberta_path", ("--data.max_length=32",)),
    "summaries": (
        "bart_path",
        ("--data.max_source_length=16", "--data.max_target_length=8", "--model.generation.max_length=8"),
    ),
    "chats": (
        "llama_path",
        (
            "--data.max_length=64",
            "--model.generation.max_new_tokens=4",
            "--model.backbone_dtype=float32",
            "--model.adapter.rank=2",
        ),
    ),
}
QUICK = ("--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--trainer.precision=32-true", "--data.batch_size=4")


@pytest.fixture
def fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Fit:
    """Return a function that fits a recipe of conf/ on a path and returns the run directory."""

    def run(recipe: str, path: Path, *options: str) -> Path:
        root = f"--trainer.default_root_dir={tmp_path / 'runs'}"
        assert main(["fit", "--config", f"conf/{recipe}.yaml", *QUICK, root, f"--data.path={path}", *options]) == 0
        return tmp_path / "runs" / "version_0"

    return run


def write_csv(path: Path, rows: list[dict[str, object]]) -> Path:
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return path


def predicted(run: Path, *options: str) -> list[dict[str, str]]:
    before = set(run.glob("predictions*.csv"))
    config = f"--config={run / 'config.yaml'}"
    assert main(["predict", config, f"--ckpt_path={run}", "--trainer.accelerator=cpu", *options]) == 0
    (new,) = set(run.glob("predictions*.csv")) - before
    with new.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a table, a folder of a table, and a folder of a photo."""
    folder = tmp_path_factory.mktemp("made")
    for name in ("reviews.csv", "tables/train.csv", "photos/cat/1.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"text,label\n")
    return folder


FOR_TEXTS = "For texts use --config conf/texts.yaml (or conf/summaries.yaml, conf/chats.yaml)."
FOR_IMAGES = "For a folder of images use --config conf/images.yaml."
TABLES = ".parquet, .csv, .tsv, .jsonl, .ndjson, .json"


@pytest.mark.parametrize(
    ("command", "recipe", "keys", "message"),
    [
        ("fit", "images", {"path": "MADE/reviews.csv"}, f"a directory or a data set's name on the hub. {FOR_TEXTS}"),
        ("fit", "images", {"path": "MADE/tables"}, f"MADE/tables holds tables and no images. {FOR_TEXTS}"),
        (
            "fit",
            "texts",
            {"path": "MADE/photos"},
            f"MADE/photos holds no table. Give a folder with files of {TABLES}. {FOR_IMAGES}",
        ),
        ("fit", "summaries", {"path": "MADE/photos/cat/1.png"}, f"must be one of {TABLES}. {FOR_IMAGES}"),
        ("fit", "chats", {"path": "conf"}, f"conf holds no table. Give a folder with files of {TABLES}."),
        ("fit", "texts", {"path": "reviws.csv"}, "data.path: reviws.csv is not here"),
        ("fit", "chats", {"path": "./chats.jsonl"}, "data.path: ./chats.jsonl is not here"),
        ("test", "summaries", {"path": "README.md"}, "data.path: README.md must be one of .parquet"),
        ("fit", "images", {"path": "/no/photos"}, "data.path: /no/photos is not here"),
        ("fit", "images", {"path": "README.md"}, "data.path: README.md is not a directory"),
        ("fit", "vit_domainbed", {"path": "PACS"}, "data.path: PACS is not a directory. DomainBed's layout"),
        ("validate", "mmlu", {"path": "./mmlu"}, "data.path: ./mmlu is not here"),
        ("predict", "texts", {"path": ".", "predict_path": "new.csv"}, "data.predict_path: new.csv is missing"),
        ("predict", "texts", {"path": ".", "predict_path": "docs"}, "data.predict_path: docs is a folder. Name one"),
        ("predict", "chats", {"path": "./x", "prompt": "Hi"}, "model.backbone: no-backbone"),  # no file is read
        ("predict", "images", {"path": "./x"}, "data.predict_path: name the image"),
        ("predict", "images", {"path": "./x", "predict_path": "a.jpg"}, "data.predict_path: a.jpg does not exist"),
    ],
)
def test_a_wrong_path_is_refused_before_the_backbone_is_loaded(
    tmp_path: Path,
    made: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    recipe: str,
    keys: dict[str, str],
    message: str,
) -> None:
    given = [f"--data.{key}={value.replace('MADE', str(made))}" for key, value in keys.items()]
    root = f"--trainer.default_root_dir={tmp_path}"
    words = [command, "--config", f"conf/{recipe}.yaml", root, "--model.backbone=no-backbone", *given]
    refused(capsys, main(words), message.replace("MADE", str(made)))
    assert list(tmp_path.iterdir()) == []


WORDS = ["good film", "bad film", "very good book", "very bad book"]


@pytest.mark.parametrize(
    ("rows", "columns", "answers"),
    [
        (
            [{"id": f"r{i}", "Review": WORDS[i % 4], "Sentiment": ["up", "down"][i % 2]} for i in range(40)],
            "text of Review; labels of Sentiment (guessed; data.text_columns and data.label_column override)",
            {"prediction", "probability", "probability_down", "probability_up"},
        ),
        (
            [{"text1": WORDS[i % 4], "text2": WORDS[i % 3], "label": i % 3} for i in range(40)],
            "text of text1, text2; labels of label (guessed; data.text_columns overrides)",
            {"prediction", "probability", "probability_0", "probability_1", "probability_2"},
        ),
        (
            [{"k": i, "sentence": WORDS[i % 4], "score": i / 8} for i in range(40)],
            "text of sentence; labels of score (guessed",
            {"prediction"},
        ),
    ],
)
def test_texts_in_a_csv(
    fit: Fit,
    tmp_path: Path,
    roberta_path: Path,
    capsys: pytest.CaptureFixture[str],
    rows: list[dict[str, object]],
    columns: str,
    answers: set[str],
) -> None:
    run = fit(
        "texts", write_csv(tmp_path / "own.csv", rows), f"--model.backbone={roberta_path}", "--data.max_length=32"
    )
    err = capsys.readouterr().err
    assert columns in err
    assert "SpearmanCorrcoef" not in err
    metrics = json.loads((run / "metrics.json").read_text())
    assert {"val/score", "test/score"} <= metrics.keys()
    texts = [name for name in rows[0] if name.lower() in ("review", "text1", "text2", "sentence")]
    new = write_csv(
        tmp_path / "new.csv", [{name: row[name] for name in ("id", *texts) if name in row} for row in rows[:3]]
    )
    table = predicted(run, f"--data.predict_path={new}")
    assert len(table) == 3
    assert table[0].keys() == {"id", *texts, *answers}
    assert table[1]["id"] == str(rows[1].get("id", 1))
    assert [table[2][name] for name in texts] == [rows[2][name] for name in texts]
    if "probability" in answers:
        shares = [float(value) for name, value in table[0].items() if name.startswith("probability_")]
        assert sum(shares) == pytest.approx(1, abs=1e-4)
        assert max(shares) == float(table[0]["probability"])


@pytest.mark.parametrize(
    ("column", "keys", "labels"),
    [
        ("rating", (), "labels: 4 classes"),
        ("rating", ("--model.class_names=[]",), "labels: numbers, read as a regression"),
        ("price", ("--data.label_column=price", "--model.class_names=[]"), "labels: numbers, read as a regression"),
    ],
)
def test_whole_numbers_are_classes_or_a_regression(
    fit: Fit,
    tmp_path: Path,
    roberta_path: Path,
    capsys: pytest.CaptureFixture[str],
    column: str,
    keys: tuple[str, ...],
    labels: str,
) -> None:
    rows: list[dict[str, object]] = [{"text": WORDS[i % 4], column: i % 4} for i in range(40)]
    backbone = f"--model.backbone={roberta_path}"
    fit("texts", write_csv(tmp_path / "own.csv", rows), backbone, *TINY["texts"][1], "--trainer.max_steps=1", *keys)
    assert labels in capsys.readouterr().err


def test_columns_that_differ_in_case_and_rows_without_text(
    fit: Fit, tmp_path: Path, roberta_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[dict[str, object]] = [{"Review": WORDS[i % 4], "Kind": ["up", "down"][i % 2]} for i in range(40)]
    path = write_csv(tmp_path / "own.csv", rows)
    backbone = (f"--model.backbone={roberta_path}", "--data.max_length=32")
    run = fit("texts", path, *backbone, "--data.text_columns=[review]", "--data.label_column=kind")
    err = capsys.readouterr().err
    assert f"data.text_columns[0]: review is read from the column Review of {path}" in err
    assert "columns: text of review; labels of kind" in err
    new = write_csv(tmp_path / "new.csv", [{"REVIEW": text} for text in ["", *WORDS]])
    table = predicted(run, f"--data.predict_path={new}")
    assert [row["review"] for row in table] == ["", *WORDS]
    assert [bool(row["error"]) for row in table] == [True, False, False, False, False]
    about_bad_rows = [line for line in capsys.readouterr().err.splitlines() if "column `error`" in line]
    assert len(about_bad_rows) == 1
    assert "1 of 5 inputs could not be predicted" in about_bad_rows[0]


def test_held_out_rows_of_a_single_file_are_disjoint(fit: Fit, tmp_path: Path, roberta_path: Path) -> None:
    from datamodules.text_classification import TextClassificationData

    path = write_csv(tmp_path / "own.csv", [{"text": f"word {i}", "label": i % 2} for i in range(50)])
    data = TextClassificationData(str(path), val_fraction=0.2, test_fraction=0.3)
    assert data.shares() == {"val": 0.2, "test": 0.3}
    run = fit("texts", path, f"--model.backbone={roberta_path}", "--data.max_length=32", "--data.test_fraction=0.3")
    predictions = json.loads((run / "metrics.json").read_text())
    assert "test/score" in predictions


def test_photos_in_a_folder_for_each_class(fit: Fit, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    photos = tmp_path / "photos"
    for label, name in enumerate(CLASSES):
        (photos / name).mkdir(parents=True)
        for i in range(12):
            Image.fromarray(colour_image(label, random)).save(photos / name / f"{i}.jpg")
    run = fit("images", photos, *TINY_VIT)
    assert {"val/acc1", "test/acc1"} <= json.loads((run / "metrics.json").read_text()).keys()
    picture = tmp_path / "one.png"
    picture.write_bytes(png(colour_image(0, random)))
    (row,) = predicted(run, f"--data.predict_path={picture}")
    assert row.keys() == {"name", "prediction", "probability", *(f"probability_{name}" for name in CLASSES)}
    assert row["name"] == "one.png" and row["prediction"] in CLASSES
    assert len(predicted(run, f"--data.predict_path={photos}")) == 36


def test_pairs_of_text_and_summary(
    fit: Fit, tmp_path: Path, bart_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[dict[str, object]] = [{"Article": f"{WORDS[i % 4]} one", "headline": WORDS[i % 4]} for i in range(20)]
    path = write_csv(tmp_path / "pairs.csv", rows)
    run = fit("summaries", path, f"--model.backbone={bart_path}", *TINY["summaries"][1])
    assert "sources of Article, targets of headline (guessed" in capsys.readouterr().err
    table = predicted(run, f"--data.predict_path={path}")
    assert table[0].keys() == {"id", "summary", "reference"} and len(table) == 20


@pytest.mark.parametrize(
    ("recipe", "columns", "line"),
    [
        ("texts", ["title", "body", "label"], "text of body; labels of label (guessed; data.text_columns overrides)"),
        (
            "texts",
            ["ad", "page", "match"],
            "text of page; labels of match (guessed; data.text_columns and data.label_column override)",
        ),
        (
            "summaries",
            ["title", "body", "summary"],
            "sources of body, targets of summary (guessed; data.source_column and data.target_column override)",
        ),
        ("chats", ["category", "prompt", "answer"], "conversations of prompt, answer, template chat"),
    ],
)
def test_a_column_that_is_not_used_is_named(
    fit: Fit,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
    recipe: str,
    columns: list[str],
    line: str,
) -> None:
    other, text, output = columns
    rows: list[dict[str, object]] = [
        {other: "good", text: f"{WORDS[i % 4]} one", output: WORDS[i % 2]} for i in range(40)
    ]
    backbone, lengths = TINY[recipe]
    path = write_csv(tmp_path / "own.csv", rows)
    fit(recipe, path, f"--model.backbone={request.getfixturevalue(backbone)}", *lengths, "--trainer.max_steps=1")
    assert f"columns: {line}; not used: {other}" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("recipe", "columns", "message"),
    [
        ("texts", ["review", "category", "rating"], "data.label_column: 2 columns of {} may hold the labels"),
        ("summaries", ["body", "abstract", "title"], "data.target_column: 2 columns of {} may hold the summaries"),
        ("chats", ["question", "response", "answer"], "data.response_column: 2 columns of {} may hold the responses"),
    ],
)
def test_two_columns_to_learn_are_refused(
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
    recipe: str,
    columns: list[str],
    message: str,
) -> None:
    path = write_csv(tmp_path / "own.csv", [dict.fromkeys(columns, WORDS[i % 2]) for i in range(40)])
    words = ["fit", "--config", f"conf/{recipe}.yaml", *QUICK, f"--trainer.default_root_dir={tmp_path / 'runs'}"]
    backbone, lengths = TINY[recipe]
    words += [f"--data.path={path}", f"--model.backbone={request.getfixturevalue(backbone)}", *lengths]
    refused(capsys, main(words), f"{message.format(path)} ({', '.join(columns[1:])}). Name one.")


@pytest.mark.parametrize("shape", [pytest.param("messages", marks=pytest.mark.slow), "columns"])
def test_chats_and_a_single_prompt(
    fit: Fit, tmp_path: Path, llama_path: Path, capsys: pytest.CaptureFixture[str], shape: str
) -> None:
    path = tmp_path / "chats.jsonl"
    if shape == "messages":
        turns = [[{"role": "user", "content": w}, {"role": "assistant", "content": "yes"}] for w in WORDS * 5]
        path.write_text("".join(json.dumps({"messages": m}) + "\n" for m in turns))
    else:
        path.write_text("".join(json.dumps({"prompt": w, "completion": "yes"}) + "\n" for w in WORDS * 5))
    run = fit("chats", path, f"--model.backbone={llama_path}", *TINY["chats"][1])
    capsys.readouterr()
    (row,) = predicted(run, "--prompt=a good film?")
    assert "response" in row and row["instruction"] == "a good film?"
    assert f"response: {escape_controls(row['response'])}" in capsys.readouterr().out
