"""Bad input of every family: one message with the key or file and what to do, exit code 2, nothing lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BartForConditionalGeneration,
    BertForMaskedLM,
    BloomConfig,
    CTRLConfig,
    PreTrainedTokenizerFast,
)

from app.callbacks import RunSummary
from app.cli import main
from app.run.checkpoint_io import AtomicCheckpointIO
from datamodules.base import ResumableDataModule
from modules.image_classification import ImageClassifier
from modules.text_classification import TextClassifier
from tests.app.conftest import CommandLine
from tests.backbones import CONFIGS, save_backbone, save_classifier, word_tokenizer
from tests.causal_backbones import POSITIONS, VOCABULARY, byte_tokenizer, save_decoder
from tests.support.disks import no_room_for
from tests.support.malicious import Malicious
from tests.support.refusals import refused
from tests.support.rows import write_rows
from tests.support.small_data import (
    colour_image,
    instructions,
    png,
    questions,
    write_instructions,
    write_pairs,
    write_parquet,
    write_sentences,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["Malicious", "refused"]  # other tests import these names from here
Change = Callable[[Path], object]
IMAGE, TEXT, SUMMARY, INSTRUCTIONS, QUESTIONS = "cli", "text_cli", "summary_cli", "instruction_cli", "question_cli"


# -------------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([], "fit, validate, test, predict"),
        (["frobnicate"], "frobnicate"),
        (["fit", "--config", "conf/nothing.yaml"], "conf/nothing.yaml"),
        (["fit", "--config", "{folder}/broken.yaml"], "broken.yaml"),
        (["fit", "--config"], "config"),
    ],
)
def test_wrong_commands_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str], part: str
) -> None:
    (tmp_path / "broken.yaml").write_text("model: {a: [1, 2")
    refused(capsys, main([word.format(folder=tmp_path) for word in words]), part)


# options, and the parts of the message, separated by bars; a key that all tasks have is tested with one task
WRONG_VALUES: dict[str, list[tuple[str, str]]] = {
    IMAGE: [
        ("--model.bakbone=x", "ImageClassifier | bakbone | did you mean backbone"),
        ("--model.adapter.rnk=3", "adapter.rnk | did you mean adapter.rank"),
        ("--data.batchsize=3", "batchsize | batch_size"),
        ("--trainer.max_epoch=3", "max_epoch"),
        ("--optimizer.lr=3", "optimizer.lr"),
        ("--model.adapter.train=C", "adapter.train | 'B', 'A', 'both' | C"),
        ("--model.tuning=everything", "tuning | 'adapter', 'head', 'full' | everything"),
        ("--model.learning_rate=fast", "learning_rate | float | fast"),
        ("--model.learning_rate=-0.1", "model.learning_rate"),
        ("--model.learning_rate=1e39", "model.learning_rate | finite | above 0"),
        ("--trainer.max_epochs=many", "trainer.max_epochs | many"),
        ("--trainer.max_epochs=-1", "trainer.max_epochs"),
        ("--model.adapter.rank=0", "adapter.rank | 1 or more"),
        ("--model.adapter.rank=33", "adapter.rank | 33 | blocks.0.attn.qkv.query | 32 × 32"),
        ("--model.adapter.init_b=orthogonal", "adapter.init_a | adapter.init_b | zero"),
        ("--model.adapter.train=A", "adapter.train | init_b: orthogonal"),
        ("--model.adapter.init_a=zero", "adapter.init_a | neither factor"),
        ("--model.adapter.dropout=1.0", "adapter.dropout | [0, 1)"),
        ("--model.adapter.alpha=-1", "adapter.alpha"),
        ("--model.adapter.targets=[quary]", "adapter.targets | quary | query"),
        ("--model.adapter.targets=[mlp_gate]", "mlp_gate | blocks.*.attn.qkv.query (query) | blocks.*.mlp.fc1"),
        ("--model.adapter.targets=regex:decoder.*", "regex:decoder.* | blocks.*.attn.proj (output)"),
        ("--model.adapter.targets=regex:(", "regex:( | regular expression"),
        ("--model.backbone=vit_bass_patch16_224", "model.backbone | vit_bass_patch16_224"),
        ("--model.image_size=15", "model.image_size | 15 | a multiple of 4"),
        ("--model.weights=nothing.safetensors", "model.weights | nothing.safetensors"),
        ("--model.weights=README.md", "model.weights | README.md | .safetensors"),
        ("--model.label_smoothing=1.5", "model.label_smoothing | [0, 1)"),
        ("--model.warmup_ratio=1", "model.warmup_ratio"),
        ("--model.optimizer.class_path=torch.optim.LBFGS", "model.optimizer.class_path | LBFGS | AdamW | SGD"),
        ("--model.optimizer.class_path=os.system", "os.system is not a supported optimizer | AdamW"),
        (
            '--model.optimizer={"class_path": "torch.optim.Adam", "init_args": {"beta": 1}}',
            "model.optimizer | Adam | beta",
        ),
        ("--model.lr_ratio_role.output=2.0", "model.lr_ratio_role | output | query, value"),
        ("--model.lr_ratio_role.value=-1", "model.lr_ratio_role.value | -1.0 | above 0"),
        ("--model.lr_ratio_role=2", "model.lr_ratio_role | 2"),
        ("--spectrum.every_n_epochs=0", "spectrum.every_n_epochs"),
        ("--checkpoint.last_every_n_steps=0", "checkpoint.last_every_n_steps"),
        ("--generalization.rows=-1", "generalization.rows: -1 must be 0 or more"),
        ("--forgetting.rows=0", "forgetting.rows: 0 must be 1 or more"),
        ("--forgetting.path=./nowhere", "forgetting.path: ./nowhere is not here"),
        ("--data.path=/nowhere/at/all", "data.path | /nowhere/at/all"),
        ("--data.path=some/hub-name", "data.path | some/hub-name | --data.path DIRECTORY | --model.weights FILE"),
        ("--data.batch_size=0", "data.batch_size | 1 or more"),
        ("--data.batch_size=1000", "data.batch_size | 48 | smaller"),
        ("--data.val_fraction=1", "data.val_fraction | (0, 1)"),
        ("--data.label_column=lable", "data.label_column | lable | img, label"),
        ("--data.max_train_samples=0", "data.max_train_samples | 1 or more"),
        ("--data.cache_prefix=true", "data.cache_prefix: training images are augmented | data.crop_scale to [1, 1]"),
        ("--trainer.accelerator=gpu", "accelerator | conf/cpu.yaml"),
        ("--trainer.strategy=ddpp", "ddpp"),
        ("--trainer.strategy=ddp_spawn", "trainer.strategy: ddp_spawn forks or spawns this process"),
        ("--trainer.strategy=fsdp", "conf/fsdp.yaml"),
        ("--trainer.strategy=deepspeed_stage_2", "conf/fsdp.yaml"),
        ("--trainer.strategy=lightning.pytorch.strategies.ModelParallelStrategy", "would shard or move"),
        ("--trainer.precision=bf16-true", "trainer.precision | bf16-mixed"),
        ("--trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches"),
        ("--trainer.val_check_interval=100", "val_check_interval | 100"),
        ("--checkpoint.monitor=val/f1", "val/f1 | val/acc1"),
        ("--ckpt_path=last", "ckpt_path | no run"),
        ("--ckpt_path=nothing.ckpt", "ckpt_path | nothing.ckpt"),
    ],
    TEXT: [
        ("--model.generation.num_beams=3", "TextClassifier | generation"),
        ("--data.max_lenght=3", "TextClassificationData | max_lenght | did you mean max_length"),
        ("--data.task=imdb", "task | 'cola' | 'wnli'"),
        ("--data.task=rte", "data.text_columns | no column sentence1 | train.parquet | sentence, label, idx"),
        ("--data.text_columns=[a, b, c]", "data.text_columns | are 3 columns | one or two"),
        ("--data.text_columns=[sentence,sentence]", "data.text_columns | sentence is named twice"),
        (
            "--data.text_columns=[label] --data.label_column=label",
            "data.label_column | label is one of data.text_columns",
        ),
        ("--data.label_column=lable", "data.label_column | no column lable | train.parquet | sentence, label, idx"),
        ("--data.encoding=utf-9", "data.encoding | utf-9 | cp1252"),
        ("--data.skip_bad_rows=-1", "data.skip_bad_rows | 0 or more"),
        ("--data.max_length=1", "data.max_length | 2 or more"),
        ("--data.max_length=65", "data.max_length | 65 | 64 | positions"),
        ("--data.padding=shortest", "padding | 'longest', 'max_length' | shortest"),
        ("--data.batch_size=51", "data.batch_size | 50 | 51 | smaller"),
        ("--data.path=some/hub-name", "data.path | some/hub-name | --data.path DIRECTORY | --model.backbone DIREC"),
        ("--model.backbone=some/hub-name", "model.backbone | some/hub-name | local directory"),
        ("--model.backbone=/nowhere/at/all", "model.backbone | /nowhere/at/all | local directory"),
        ("--model.backbone=tests", "model.backbone | tests | config.json"),
        ("--model.weights=nothing.safetensors", "model.weights | nothing.safetensors | `pretrained` | `none`"),
        ("--model.backbone_args={hiden_dropout: 0.1}", "model.backbone_args | hiden_dropout | hidden_dropout_prob"),
        ("--model.metrics=[pearson]", "model.metrics | pearson | 2 classes | accuracy, f1, macro_f1, matthews"),
        ("--model.metrics=[]", "model.metrics | [] | accuracy, f1, macro_f1, matthews"),
        ("--model.class_names=[only]", "model.class_names | only | two or more"),
        ("--model.class_names=[bad, good]", "train.parquet | unacceptable | acceptable | bad, good"),
        ("--model.class_names=[yes, no]", "class_names | str | True"),  # YAML parses yes and no as booleans
        ("--model.class_names=[]", "data.label_column | regression | train.parquet | unacceptable, acceptable"),
        ("--model.adapter.layers=0", "adapter.layers: 0 must be a whole number"),
        ("--model.adapter.layers=3", "adapter.layers: 3 is more than the number of blocks"),
        ("--checkpoint.monitor=val/acc1", "val/acc1 | val/score | val/matthews"),
        ("--forgetting.path=x", "TextClassifier has no score of forgetting. Use ImageClassifier or Language"),
        ("--test_after_fit=true", "data.label_column | test.parquet | -1 | hidden"),
    ],
    SUMMARY: [
        ("--variant=head", "model.tuning: expected one of 'adapter', 'full'"),
        ("--model.generation.num_bems=3", "generation.num_bems | did you mean generation.num_beams"),
        ("--model.generation.num_beam=3", "generation.num_beam | did you mean"),  # abbreviated keys are refused
        ("--model.adapter.ran=2", "adapter.ran | did you mean"),
        ("--model.generation.num_beams=0", "model.generation.num_beams | 0 | 1 or more"),
        ("--model.generation.num_beams=many", "generation.num_beams | int | many"),
        ("--model.generation.min_length=13", "model.generation | min_length 13 | max_length 12"),
        ("--model.generation.max_length=1", "model.generation | max_length 1 | 2 or more"),
        ("--model.generation.max_length=65", "model.generation.max_length | 65 | 64 | positions"),
        ("--model.generation.no_repeat_ngram_size=-1", "model.generation.no_repeat_ngram_size | -1"),
        ("--data.task=cola", "SummarizationData | task"),
        ("--data.cache_prefix=true", "cache_prefix"),
        ("--data.max_source_length=65", "data.max_source_length | 65 | 64 | positions"),
        ("--data.max_target_length=65", "data.max_target_length | 65 | 64 | positions"),
        ("--data.max_source_length=1", "data.max_source_length | 2 or more"),
        ("--data.source_column=article", "data.source_column | train.jsonl | article | document, summary, id"),
        ("--data.target_column=text", "data.target_column | train.jsonl | text | document, summary, id"),
        ("--model.backbone={roberta}", "model.backbone | {roberta} | is a roberta | Choose another"),
        ("--checkpoint.monitor=val/score", "val/score | val/rougeL"),
    ],
    INSTRUCTIONS: [
        ("--model.generation.num_beams=3", "generation.num_beams | max_new_tokens | top_p"),
        ("--model.generation.max_new_tokens=512", "model.generation.max_new_tokens | 512 | no room for a prompt"),
        ("--model.generation.max_new_tokens=0", "model.generation.max_new_tokens | 0 | 1 or more"),
        ("--model.generation.temperature=0", "model.generation.temperature | above 0 | do_sample: false"),
        ("--model.generation.top_p=2", "model.generation | top_p 2.0 | (0, 1]"),
        ("--model.generation.top_k=-1", "model.generation | top_k -1 | negative"),
        ("--model.tuning=full --model.backbone_dtype=bfloat16", "model.backbone_dtype | bfloat16 | use float32"),
        ("--model.adapter.rank=17", "adapter.rank | 17 | v_proj | 16 × 32"),
        ("--model.backbone=/nowhere/model.gguf", "model.backbone | /nowhere/model.gguf | no file"),
        ("--model.backbone=some/hub-name/model.gguf", "model.backbone | some/hub-name/model.gguf | connection"),
        ("--model.shard_frozen=true --data.cache_prefix=true", "data.cache_prefix: with model.shard_frozen: true"),
        ("--data.template=vicuna", "template | 'alpaca', 'chat' | vicuna"),
        ("--data.max_length=513", "data.max_length | 513 | 512 | positions"),
        ("--data.max_length=15", "data.max_length | 15 | 16 or more"),
        (
            "--data.instruction_column=prompt",
            "data.instruction_column | train.jsonl | prompt | instruction, input, output",
        ),
        (
            "--data.response_column=answer",
            "data.response_column | train.jsonl | answer | instruction, input, output",
        ),
        ("--data.input_column=context", "data.input_column | train.jsonl | context | instruction, input, output"),
        ("--data.packing=true --data.batch_size=50", "packs | smaller batch"),
        ("--forgetting.path=./nowhere", "forgetting.path: ./nowhere is not here"),
    ],
    QUESTIONS: [
        ("--data.shots=-1", "data.shots | -1 | negative"),
        ("--data.shots=many", "shots | int | many"),
        ("--data.shots_split=test", "data.shots_split | test.jsonl | among the questions"),
        ("--data.subjects=[anatomy]", "data.subjects | anatomy | astronomy, philosophy"),
        ("--data.max_length=50", "data.max_length | 50"),
        ("--data.answer_column=target", "data.answer_column | no column target"),
        ("--data.templat=chat", "MultipleChoiceData | templat"),
        ("fit", "MultipleChoiceData | no training rows | LanguageModelingData"),
        ("predict --data.predict_path=rows.txt", "data.predict_path | rows.txt"),
    ],
}
# Values that are refused after config.yaml is written. Metrics need the data's classes, batches need the loader, and
# packing needs the model. Keys of the trainer need the trainer. The monitored metric and interval need a validation.
LATE = ("--model.metrics", "--data.batch_size=51", "--data.batch_size=1000", "--data.packing", "--checkpoint.monitor")
LATE = (*LATE, "--trainer.val_check_interval", "--trainer.max_epochs=-1", "--trainer.precision")


@pytest.mark.parametrize(
    ("any_cli", "words", "parts"),
    [(family, *row) for family, rows in WRONG_VALUES.items() for row in rows],
    indirect=["any_cli"],
)
def test_wrong_values_are_refused(
    any_cli: CommandLine, capsys: pytest.CaptureFixture[str], roberta_path: Path, words: str, parts: str
) -> None:
    command, *options = words.replace("{roberta}", str(roberta_path)).replace(" --", "\n--").split("\n")
    if command.startswith("--"):
        command, options = "test" if any_cli.config == "questions" else "fit", [command, *options]
    refused(capsys, any_cli(command, *options), *parts.replace("{roberta}", str(roberta_path)).split(" | "))
    assert any_cli.run().exists() is words.startswith(LATE)


def test_an_unknown_key_in_a_file_gets_a_suggestion(
    instruction_cli: CommandLine, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "more.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"adapter": {"rnk": 3}}}}))
    code = instruction_cli("fit", "--config", str(tmp_path / "more.yaml"))
    refused(capsys, code, "LanguageModel", "adapter.rnk", "did you mean adapter.rank")


@pytest.mark.parametrize("any_cli", [IMAGE, TEXT, SUMMARY, INSTRUCTIONS], indirect=True)
def test_the_model_is_checked_before_any_data_is_read(
    any_cli: CommandLine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*args: object) -> None:
        raise AssertionError("data was read")

    for kind in ResumableDataModule.__subclasses__():
        monkeypatch.setattr(kind, "setup", read)
    refused(capsys, any_cli("fit", "--model.adapter.targets=[nothing]"), "nothing")


@pytest.mark.parametrize(
    ("model", "data"),
    [
        ("summarization.Summarizer", "language_modeling.LanguageModelingData"),
        ("language_modeling.LanguageModel", "summarization.SummarizationData"),
        ("text_classification.TextClassifier", "image_classification.ImageClassificationData"),
    ],
)
def test_data_of_another_task_is_refused(capsys: pytest.CaptureFixture[str], model: str, data: str) -> None:
    code = main(["fit", f"--model=modules.{model}", f"--data=datamodules.{data}", "--data.path=x"])
    refused(capsys, code, f"data: datamodules.{data} gives ", f"modules.{model} takes", "Change --data or --model.")


# ---------------------------------------------------------------------------------------------------------------- data


def labelled(*labels: Any) -> list[dict[str, Any]]:
    return [{"sentence": f"w{i} good", "label": label} for i, label in enumerate(labels)]


def pairs(size: int) -> list[dict[str, Any]]:
    return [{"document": f"w{i} good", "summary": "the film was good ."} for i in range(size)]


def turns(*messages: tuple[str, str | None]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


def write_images(folder: Path, cells: list[bytes], labels: list[int]) -> None:
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"img": [{"bytes": cell, "path": None} for cell in cells], "label": labels}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / "train.parquet"))


def truncated_parquet(folder: Path) -> None:
    file = write_sentences(folder, {"train": 20}) / "train.parquet"
    file.write_bytes(file.read_bytes()[:-100])


OWN = ("--data.task=null", "--data.text_columns=[sentence]")
PICTURE = png(colour_image(0, np.random.default_rng(0)))
NAN = {"sentence": [f"w{i}" for i in range(20)], "label": [float("nan") if i == 7 else i / 2 for i in range(20)]}
TALK = turns(("user", "Say w1."), ("assistant", "w1"))
# family, options, files with rows or text (or a function that writes files), parts of the message; the tests of
# datamodules have the other messages
DAMAGED_DATA: list[tuple[str, tuple[str, ...], dict[str, Any] | Change, str]] = [
    (IMAGE, (), {}, "data. | no images"),
    (
        IMAGE,
        (),
        lambda folder: write_images(folder, [PICTURE] * 7 + [PICTURE[:99]] + [PICTURE] * 12, [0, 1] * 10),
        "data. | train.parquet row 7",
    ),
    (
        IMAGE,
        (),
        lambda folder: write_images(folder, [PICTURE] * 20, [0, 1] * 9 + [1, -1]),
        "data. | is -1 in row 19, outside 0 to 1",
    ),
    (
        IMAGE,
        ("--test_after_fit=true",),
        lambda folder: write_parquet(folder, {"train": 30}),
        "data.path | no test split | test_after_fit",
    ),
    (TEXT, (), lambda folder: write_sentences(folder, {"validation": 20}), "data.path | train.parquet | train.csv"),
    (TEXT, (), lambda folder: write_sentences(folder, {"train": 20, "validation": 0}), "validation.parquet | no rows"),
    (TEXT, (), truncated_parquet, "data.path | train.parquet | cannot be read | damaged"),
    (
        TEXT,
        (),
        {"train.jsonl": labelled(*"gb" * 10), "validation.jsonl": labelled("g", "ugly")},
        "validation.jsonl | ugly | b, g",
    ),
    (
        TEXT,
        (),
        {"train.jsonl": labelled(*[0, 1] * 10), "validation.jsonl": labelled(0.5, 1.5)},
        "data.label_column | validation.jsonl | regression | classification into 0, 1",
    ),
    (
        TEXT,
        (),
        {"train.jsonl": labelled(*[0, 1] * 10, None)},
        "data.label_column | train.jsonl | row 20 of | label that is empty | data.skip_bad_rows",
    ),
    (
        TEXT,
        (),
        {"train.csv": "sentence,label\n" + "w1,1\nw2,2.5\n" * 9 + "w7,inf\n"},
        "data.label_column | train.csv | row 18 of | label that is inf",
    ),
    (
        TEXT,
        (),
        lambda folder: datasets.Dataset.from_dict(NAN).to_parquet(str(folder / "train.parquet")),
        "data.label_column | train.parquet | row 7 of | label that is nan",
    ),
    (TEXT, (), {"train.jsonl": labelled(*["good"] * 20)}, "class_names | good | two or more"),
    (
        TEXT,
        ("--model.backbone={classifier}",),  # a classifier whose class names are known
        {"train.jsonl": labelled(*["acceptable", "doubtful"] * 10)},
        "data.label_column | train.jsonl | doubtful | acceptable",
    ),
    (
        TEXT,
        ("--data.test_on_validation=true", "--test_after_fit=true"),
        lambda folder: write_sentences(folder, {"train": 30}),
        "data.path | no validation split",
    ),
    (
        SUMMARY,
        (),
        {"train.jsonl": [*pairs(20), {"document": None, "summary": "w1"}]},
        "data.source_column | row 20 of | train.jsonl | no text in column document",
    ),
    (
        SUMMARY,
        ("--test_after_fit=true",),
        lambda folder: write_pairs(folder, {"train": 30, "validation": 10}),
        "data.path | no test split | test_after_fit",
    ),
    (
        INSTRUCTIONS,
        (),
        {"train.jsonl": [row | ({"output": " "} if i == 7 else {}) for i, row in enumerate(instructions(20))]},
        "data.response_column | row 7 of | train.jsonl | no response | empty_responses skip",
    ),
    (
        INSTRUCTIONS,
        (),
        {"train.jsonl": [TALK] * 8 + [turns(("tool", "Say w1."), ("assistant", "w1"))]},
        "data.messages_column | row 8 of | train.jsonl | system, user, assistant | tool",
    ),
    (
        INSTRUCTIONS,
        ("--data.empty_responses=skip",),
        {"train.jsonl": [row | {"output": ""} for row in instructions(20)]},
        "data.path | train.jsonl | no row with a response",
    ),
    (QUESTIONS, (), {"test.jsonl": questions(4)}, "data.shots_split | no dev split | data.shots"),
    (
        QUESTIONS,
        (),
        {"dev.jsonl": questions(3), "test.jsonl": questions(4)},
        "data.shots | dev.jsonl | 1 question of philosophy for 2 shots",
    ),
    (QUESTIONS, (), {"dev.jsonl": questions(10)}, "data.path | no test split"),
    (
        QUESTIONS,
        (),
        {"dev.jsonl": questions(10), "test.jsonl": [*questions(4), questions(1)[0] | {"answer": -1}]},
        "data.answer_column | test.jsonl | from 0 to 3 | row 4 of | has -1",
    ),
    (
        QUESTIONS,
        (),
        {"dev.jsonl": questions(10), "test.jsonl": [*questions(4), questions(1)[0] | {"question": "w " * POSITIONS}]},
        f"data.max_length | astronomy | without a shot | {POSITIONS} | data.subjects",
    ),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.mark.parametrize(("any_cli", "options", "files", "parts"), DAMAGED_DATA, indirect=["any_cli"])
def test_damaged_data_is_refused(
    any_cli: CommandLine,
    capsys: pytest.CaptureFixture[str],
    folder: Path,
    options: tuple[str, ...],
    files: dict[str, Any] | Change,
    parts: str,
) -> None:
    if callable(files):
        files(folder)
    else:
        for name, content in files.items():
            (folder / name).write_text(content) if isinstance(content, str) else write_rows(folder / name, content)
    if "{classifier}" in "".join(options):
        classifier = save_classifier(folder.parent / "classifier", "roberta", ["unacceptable", "acceptable"])
        options = (f"--model.backbone={classifier}",)
    elif any_cli.config == "text" and not options:
        options = OWN
    command = "test" if any_cli.config == "questions" else "fit"
    refused(capsys, any_cli(command, f"--data.path={folder}", *options), *parts.split(" | "))
    # the model checks its class names after the run directory exists
    assert any_cli.run().exists() is parts.startswith("class_names")


NOT_PREDICTED: list[tuple[str, dict[str, str], str]] = [
    ("fitted_cli", {}, "data.predict_path"),
    ("fitted_cli", {"none/": ""}, "holds no image | none"),
    ("fitted_summary_cli", {"nothing.csv": ""}, "data.predict_path | nothing.csv | .jsonl"),
    ("fitted_summary_cli", {"rows.txt": "w1"}, "data.predict_path | rows.txt | .jsonl"),
    ("fitted_text_cli", {"rows.csv": "words\nw1\n"}, "rows.csv | no column | words"),
    ("fitted_text_cli", {"hole.csv": "sentence,document\n,\n,\n"}, "hole.csv | empty in every row"),
    ("instruction_cli", {"rows.jsonl": "Say w1.\nSay w2.\n"}, "data. | rows.jsonl | cannot be read | json"),
    ("instruction_cli", {"rows.jsonl": '{"k": "w1"}\n'}, "data.instruction_column | its columns: k"),
    (
        "instruction_cli",
        {"rows.jsonl": json.dumps(turns(("assistant", "w1"))) + "\n"},
        "data. | row 0 of | rows.jsonl | user",
    ),
]


@pytest.mark.parametrize(("any_cli", "files", "parts"), NOT_PREDICTED, indirect=["any_cli"])
def test_files_that_cannot_be_predicted_are_refused(
    any_cli: CommandLine, capsys: pytest.CaptureFixture[str], folder: Path, files: dict[str, str], parts: str
) -> None:
    options = ["--ckpt_path=last"] if any_cli.root.exists() else []
    for name, content in files.items():
        if name.endswith("/"):
            (folder / name).mkdir()
        elif content:
            (folder / name).write_text(content)
        options.append(f"--data.predict_path={folder / name}")
    refused(capsys, any_cli("predict", *options), *parts.split(" | "))


def test_predict_without_a_test_split(
    fitted_summary_cli: CommandLine, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    code = fitted_summary_cli("predict", "--ckpt_path=last", f"--data.path={write_pairs(folder, {'train': 12})}")
    refused(capsys, code, "data.predict_path", str(folder), "no test split", "Name a file")


# ------------------------------------------------------------------------------------------------------------ backbone


def no_tokenizer(path: Path) -> None:
    for file in path.glob("tokenizer*"):
        file.unlink()


def larger_tokenizer(path: Path) -> None:
    tokenizer: PreTrainedTokenizerFast = word_tokenizer()
    tokenizer.add_tokens([f"more{i}" for i in range(5)])
    tokenizer.save_pretrained(path)


def no_output_layer(path: Path) -> None:
    save_decoder(path, tie_word_embeddings=False)
    state = load_file(path / "model.safetensors")
    del state["lm_head.weight"]
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})


def other_model(kind: type, name: str) -> Change:
    def write(path: Path) -> None:
        shutil.rmtree(path)
        kind(CONFIGS[name]).save_pretrained(path)
        word_tokenizer().save_pretrained(path)

    return write


# tests/modules/backbones has the other faults of a backbone's directory
BACKBONES: list[tuple[str, Change, str]] = [
    (TEXT, no_tokenizer, "model.backbone | {path} | tokenizer | beside config.json"),
    (TEXT, larger_tokenizer, "model.backbone | {path} | 59 tokens | 54 embeddings"),
    (TEXT, lambda path: (path / "adapter_config.json").write_text("{}"), "model.backbone | {path} | PEFT"),
    (TEXT, lambda path: (path / "model.safetensors").write_bytes(b"cut"), "model.weights | {path} | could not be"),
    (INSTRUCTIONS, no_output_layer, "model.weights | {path} | lm_head.weight"),
    (
        INSTRUCTIONS,
        lambda path: byte_tokenizer(eos_token=None).save_pretrained(path),
        "model.backbone | {path} | eos_token | tokenizer_config.json",
    ),
    (
        INSTRUCTIONS,
        lambda path: byte_tokenizer(chat_template="{% for message in messages %}{{ message").save_pretrained(path),
        "data.template | chat template",
    ),
    (INSTRUCTIONS, other_model(BertForMaskedLM, "bert"), "model.backbone | {path} | bert | Choose a decoder"),
    (
        INSTRUCTIONS,
        other_model(BartForConditionalGeneration, "bart"),
        "model.backbone | {path} | is a bart | no model for CausalLM | Choose another",
    ),
]


@pytest.mark.parametrize(("any_cli", "change", "parts"), BACKBONES, indirect=["any_cli"])
def test_damaged_backbones_are_refused(
    any_cli: CommandLine, capsys: pytest.CaptureFixture[str], tmp_path: Path, change: Change, parts: str
) -> None:
    path = Path(shutil.copytree(any_cli.backbone[1], tmp_path / "backbone"))
    change(path)
    words = [f"--model.backbone={path}", "--model.backbone_args={}", "--data.max_length=64"]
    refused(capsys, any_cli("fit", *words), *(part.format(path=path) for part in parts.split(" | ")))
    assert not any_cli.run().exists()


def test_an_unreadable_gguf_file_is_refused(
    instruction_cli: CommandLine, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(40))
    words = ["fit", f"--model.backbone={path}", "--model.backbone_args={}"]
    refused(capsys, instruction_cli(*words), "model.backbone", str(path), "GGUF")
    monkeypatch.setattr("modules.backbones.gguf.is_gguf_available", lambda: False)
    refused(capsys, instruction_cli(*words), "model.backbone", "pip install gguf")


SMALL = {"vocab_size": len(VOCABULARY), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
OTHERS: dict[str, PreTrainedConfig] = {
    "bloom": BloomConfig(hidden_size=32, n_layer=1, n_head=2, **SMALL),
    "ctrl": CTRLConfig(n_positions=POSITIONS, n_embd=32, dff=64, n_layer=1, n_head=2, **SMALL),
}


@pytest.mark.parametrize(
    ("kind", "key", "name"),
    [("bloom", "data.packing", "BloomForCausalLM"), ("ctrl", "model.gradient_checkpointing", "CTRL")],
)
def test_a_key_that_the_backbone_does_not_support_is_refused(
    instruction_cli: CommandLine,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    key: str,
    name: str,
) -> None:
    monkeypatch.setattr("tests.causal_backbones.CONFIGS", OTHERS)
    words = [f"--model.backbone={save_decoder(tmp_path / kind, kind)}", "--model.backbone_args={}"]
    code = instruction_cli("fit", *words, "--model.tuning=full", f"--{key}=true")
    refused(capsys, code, key, name, "Set the key")


def test_a_tokenizer_with_several_tokens_for_a_letter_is_refused(
    question_cli: CommandLine, capsys: pytest.CaptureFixture[str], llama_path: Path, tmp_path: Path
) -> None:
    path = shutil.copytree(llama_path, tmp_path / "backbone")
    tokenizer = Tokenizer(models.BPE(VOCABULARY, [], unk_token="<unk>"))  # two tokens for ` A`: a space and an A
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>").save_pretrained(path)
    code = question_cli("test", f"--model.backbone={path}")
    refused(capsys, code, "tokenizer", "a separate token", "A to D", "another backbone")


def test_weights_of_another_model_are_refused(
    cli: CommandLine, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"conv1.weight": torch.zeros(300)}, path)
    refused(capsys, cli("fit", f"--model.weights={path}"), "does not fit", "missing", "unexpected: conv1.weight")
    path.write_bytes(path.read_bytes()[:200])
    refused(capsys, cli("fit", f"--model.weights={path}"), "other.safetensors", "cannot be read")


# --------------------------------------------------------------------------------------------------------- checkpoints

SHAPE = "of another shape | is (4, 32), not (2, 32) | config.yaml"
# family, command, options, parts of the message
OTHER_MODELS: list[tuple[str, str, str, str]] = [
    ("fitted_cli", "fit", "--model.adapter.targets=[query, value, key]", "4 missing | adapters.key.A"),
    ("fitted_cli", "fit", "--model.adapter.targets=[query]", "4 unexpected | adapters.value.B"),
    ("fitted_cli", "fit", "--model.tuning=head", "model.tuning | with tuning adapter | has tuning head"),
    ("fitted_cli", "fit", "--model.class_names=[a, b, c]", "a, b, c | red, green, blue"),
    # with weights: none, seed_everything draws the backbone
    ("fitted_cli", "test", "--seed_everything=1", "other frozen weights | model.weights"),
    (
        "fitted_cli",
        "fit",
        '--model.optimizer={"class_path": "torch.optim.SGD"}',
        "ckpt_path | model.optimizer | model.adapter_path",
    ),
    ("fitted_text_cli", "fit", "--model.adapter.rank=2", SHAPE),
    ("fitted_text_cli", "validate", "--model.adapter.rank=2", SHAPE),
    ("fitted_text_cli", "validate", "--model.backbone={other}", "other frozen weights | model.backbone"),
    ("fitted_text_cli", "predict", "--model.backbone_dtype=bfloat16", "other frozen weights | model.backbone_dtype"),
    (
        "fitted_text_cli",
        "fit",
        "--data.task=rte --data.path={rte}",
        ".jsonl | not trained on (entailment, not_entailment) | unacceptable, acceptable",
    ),
    (
        "fitted_text_cli",
        "validate",
        "--data.path={scores} --data.task=null --data.text_columns=[sentence]",
        "data.label_column | the model is for classification into unacceptable, acceptable | .jsonl | regression",
    ),
    ("fitted_text_cli", "test", "", "data.label_column | test.parquet | hidden | predict"),
    ("fitted_summary_cli", "test", "--model.tuning=full", "model.tuning | with tuning adapter"),
    ("fitted_instruction_cli", "fit", "--data.template=alpaca", "data.template | another prompt template | Set data."),
    ("fitted_instruction_cli", "predict", "--data.template=alpaca", "data.template | another prompt template"),
]


@pytest.mark.parametrize(("any_cli", "command", "words", "parts"), OTHER_MODELS, indirect=["any_cli"])
def test_a_checkpoint_of_another_model_is_refused(
    any_cli: CommandLine, capsys: pytest.CaptureFixture[str], folder: Path, command: str, words: str, parts: str
) -> None:
    last = any_cli.run() / "checkpoints" / "last.ckpt"
    before = last.read_bytes()
    if "{other}" in words:
        words = words.format(other=save_backbone(folder / "other", "roberta", seed=1))
    for split in ("train", "validation"):
        write_rows(folder / "scores" / f"{split}.jsonl", labelled(*(i / 2 for i in range(12))))
        rte = [{"sentence1": f"w{i}", "sentence2": "good", "label": i % 2} for i in range(12)]
        write_rows(folder / "rte" / f"{split}.jsonl", rte)
    words = words.replace("{scores}", str(folder / "scores")).replace("{rte}", str(folder / "rte"))
    options = words.replace(" --", "\n--").split("\n") if words else []
    refused(capsys, any_cli(command, "--ckpt_path=last", *options), *parts.split(" | "))
    assert last.read_bytes() == before
    assert not any_cli.run(1).exists()


@pytest.mark.parametrize(
    ("fitted", "other", "command", "parts"),
    [
        ("fitted_cli", TEXT, "fit", "ImageClassifier | config.yaml"),
        ("fitted_cli", SUMMARY, "test", "ImageClassifier | config.yaml"),
        ("fitted_summary_cli", INSTRUCTIONS, "fit", "Summarizer | LanguageModel | config.yaml"),
        ("fitted_summary_cli", QUESTIONS, "test", "Summarizer | LanguageModel | config.yaml"),
        ("fitted_instruction_cli", QUESTIONS, "fit", "LanguageModelingData | MultipleChoiceData | config.yaml"),
    ],
)
def test_a_checkpoint_of_another_task_is_refused(
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
    fitted: str,
    other: str,
    command: str,
    parts: str,
) -> None:
    run = request.getfixturevalue(fitted).run()
    code = request.getfixturevalue(other)(command, f"--ckpt_path={run}")
    refused(capsys, code, "ckpt_path", *parts.split(" | "))


def test_classes_are_refused_by_a_regression_checkpoint(
    text_cli: CommandLine, capsys: pytest.CaptureFixture[str], folder: Path, cola_path: Path
) -> None:
    for split in ("train", "validation"):
        write_rows(folder / f"{split}.jsonl", labelled(*(i / 2 for i in range(12))))
    assert text_cli("fit", f"--data.path={folder}", *OWN, "--trainer.max_epochs=1") == 0
    capsys.readouterr()
    code = text_cli("validate", "--ckpt_path=last", f"--data.path={cola_path}")
    refused(capsys, code, "data.label_column", "the model is for regression", "classification into unacceptable")


def test_a_checkpoint_without_a_frozen_factor_or_truncated_is_refused(
    fitted_cli: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    path = fitted_cli.run() / "checkpoints" / "last.ckpt"
    checkpoint = fitted_cli.checkpoint()
    del checkpoint["state_dict"]["backbone.blocks.1.attn.qkv.adapters.query.A"]
    AtomicCheckpointIO().save_checkpoint(checkpoint, path)
    refused(capsys, fitted_cli("test", "--ckpt_path=last"), "1 missing", "blocks.1.attn.qkv.adapters.query.A")
    path.write_bytes(path.read_bytes()[:2000])
    refused(capsys, fitted_cli("fit", f"--ckpt_path={path}"), "last.ckpt", "truncated")


# --------------------------------------------------------------------------------------------------- during the run


def test_weights_that_are_not_finite_are_not_saved(
    cli: CommandLine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_gradient_infinite(self: ImageClassifier) -> None:
        if self.global_step == 7:  # the loss is finite and its gradient is not
            next(p for p in self.parameters() if p.grad is not None).grad.fill_(float("inf"))  # type: ignore[union-attr]

    monkeypatch.setattr(ImageClassifier, "on_after_backward", make_gradient_infinite)
    refused(capsys, cli("fit", "--checkpoint.last_every_n_steps=2"), "--ckpt_path last")
    assert all(tensor.isfinite().all() for tensor in cli.checkpoint()["state_dict"].values())
    assert cli.checkpoint()["global_step"] == 7


def test_a_run_that_diverges_saves_nothing(
    instruction_cli: CommandLine, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    data = write_instructions(folder, {"train": 30})
    code = instruction_cli("fit", f"--data.path={data}", "--model.learning_rate=1e37", "--trainer.max_epochs=1")
    refused(capsys, code, "at step", "were not saved", "learning_rate")
    assert not list(instruction_cli.run().rglob("*.ckpt"))


def test_a_loss_that_is_not_finite_ends_the_run(
    text_cli: CommandLine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = TextClassifier.forward

    def forward(self: TextClassifier, batch: Any) -> torch.Tensor:
        return original(self, batch) * (float("nan") if self.training and self.global_step == 7 else 1.0)

    monkeypatch.setattr(TextClassifier, "forward", forward)
    code = text_cli("fit", "--trainer.max_epochs=1", "--checkpoint.last_every_n_steps=2")
    refused(capsys, code, "nan at step 7", "--ckpt_path last", "learning_rate")
    checkpoint = text_cli.checkpoint()
    assert checkpoint["global_step"] == 7
    assert all(tensor.isfinite().all() for tensor in checkpoint["state_dict"].values())
    monkeypatch.setattr(TextClassifier, "forward", original)
    assert text_cli("fit", "--trainer.max_epochs=1", "--ckpt_path=last") == 0
    assert text_cli.checkpoint()["global_step"] == 8


def test_a_full_disk_keeps_earlier_checkpoints(cli: CommandLine, capsys: pytest.CaptureFixture[str]) -> None:
    with no_room_for(".last.ckpt.", after=10):  # each checkpoint opens its file twice, so five are written
        code = cli("fit", "--checkpoint.last_every_n_steps=2")
    refused(capsys, code, "last.ckpt", "could not be written", "No space left on device", "--ckpt_path last")
    names = {p.name for p in (cli.run() / "checkpoints").iterdir()}
    assert names == {"best.ckpt", "last.ckpt", "previous.ckpt"}
    assert cli.checkpoint()["global_step"] > 0


def test_cache_that_cannot_be_written(
    text_cli: CommandLine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    cache = tmp_path / "file" / "cache"  # nobody, not even root, can create a folder below a file
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    refused(capsys, text_cli("fit"), str(cache), "HF_DATASETS_CACHE")
    assert not text_cli.run().exists()


def test_a_defect_keeps_its_traceback(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    def hook(*args: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(RunSummary, "on_fit_start", hook)
    with pytest.raises(ZeroDivisionError):
        cli("fit")


@pytest.mark.parametrize("command", ["fit", "test", "predict"])
def test_a_directory_without_checkpoints_is_refused_and_stays_as_it_is(
    cli: CommandLine, capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    code = cli(command, f"--ckpt_path={folder}")
    refused(capsys, code, f"ckpt_path: {folder} holds no checkpoints.", "The command `runs` lists the runs.")
    assert not list(folder.iterdir())
