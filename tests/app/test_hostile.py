"""Security: files of a stranger run no code, and write nothing outside of the run directory."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from app.cli import main, restricted_imports
from app.run.evaluations import Evaluation, add_evaluation
from tests.backbones import save_backbone
from tests.support.malicious import Malicious
from tests.support.refusals import refused
from tests.support.rows import edit_json
from tests.support.small_data import CLASSES, colour_image, png, write_parquet

if TYPE_CHECKING:
    from tests.app.conftest import CommandLine


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """Return a path that the stranger's code would create, and check that the path does not exist."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "the stranger's code ran"


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """Return a folder outside of the run, and check that the folder stays empty."""
    folder = tmp_path / "outside"
    folder.mkdir()
    yield folder
    assert list(folder.iterdir()) == []


def overlay(folder: Path, content: dict[str, Any]) -> str:
    path = folder / "stranger.yaml"
    path.write_text(yaml.safe_dump(content))
    return f"--config={path}"


# ------------------------------------------------------------------------------------------------------------- classes


def calls(canary: Path) -> list[dict[str, Any]]:
    """Return descriptions of objects whose construction would create the canary."""
    return [
        {"class_path": "os.system", "init_args": {"command": f"touch {canary}"}},
        {"class_path": "builtins.eval", "init_args": {"source": f"open({str(canary)!r}, 'w')"}},
        {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", str(canary)]}},
        {"class_path": "modules.base.torch.load", "init_args": {"f": str(canary), "weights_only": False}},
        {"class_path": "stranger_of_the_working_directory.Model"},
    ]


PLACES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "model": lambda call: {"model": call},
    "data": lambda call: {"data": call},
    "callbacks": lambda call: {"trainer": {"callbacks": [call]}},
    "callback": lambda call: {"trainer": {"callbacks": call}},
    "logger": lambda call: {"trainer": {"logger": call}},
    "plugins": lambda call: {"trainer": {"plugins": [call]}},
    "profiler": lambda call: {"trainer": {"profiler": call}},
    "strategy": lambda call: {"trainer": {"strategy": call}},
    "a callable": lambda call: {
        "trainer": {"callbacks": [{"class_path": "LambdaCallback", "init_args": {"on_fit_start": call["class_path"]}}]}
    },
    "nested": lambda call: {
        "trainer": {"callbacks": [{"class_path": "LambdaCallback", "init_args": {"on_fit_start": call}}]}
    },
    "a plugin's plugin": lambda call: {
        "trainer": {
            "plugins": [
                {"class_path": "lightning.pytorch.plugins.AsyncCheckpointIO", "init_args": {"checkpoint_io": call}}
            ]
        }
    },
}


@pytest.mark.parametrize("place", PLACES)
def test_a_configuration_may_not_name_other_classes(
    cli: CommandLine, capsys: pytest.CaptureFixture[str], tmp_path: Path, canary: Path, place: str
) -> None:
    (tmp_path / "stranger_of_the_working_directory.py").write_text(f"open({str(canary)!r}, 'w')")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        for call in calls(canary):
            code = cli("fit", overlay(tmp_path, PLACES[place](call)))
            allows = [] if call["class_path"].startswith("modules.") else ["--allow_imports"]
            refused(capsys, code, "is not imported", *allows)
    assert not cli.root.exists()


def test_a_dict_is_not_constructed_where_any_value_is_allowed(cli: CommandLine, tmp_path: Path, canary: Path) -> None:
    """`backbone_args` takes any value. A dict with class_path stays a dict, and timm refuses it."""
    call = calls(canary)[0]
    assert cli("fit", overlay(tmp_path, {"model": {"init_args": {"backbone_args": {"drop_rate": call}}}})) == 2


@pytest.mark.parametrize("option", ["--model=os.system", "--trainer.callbacks+=os.system", "--model.help=os.system"])
def test_other_classes_on_the_command_line_are_refused(
    cli: CommandLine, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    refused(capsys, cli("fit", option), "'os.system' is not imported", "--allow_imports os")


def test_a_file_named_in_a_configuration_is_restricted_too(
    cli: CommandLine, capsys: pytest.CaptureFixture[str], tmp_path: Path, canary: Path
) -> None:
    inner = tmp_path / "inner.yaml"
    inner.write_text(yaml.safe_dump(calls(canary)[0]))
    for section in ("model", "data"):
        refused(capsys, cli("fit", overlay(tmp_path, {section: str(inner)})), "'os.system' is not imported")


def test_load_from_checkpoint_may_not_be_named(
    cli: CommandLine, capsys: pytest.CaptureFixture[str], tmp_path: Path, canary: Path
) -> None:
    """Lightning's load_from_checkpoint would unpickle the file."""
    torch.save({"state_dict": Malicious(canary)}, tmp_path / "evil.ckpt")
    for section, path in (
        ("model", "modules.image_classification.ImageClassifier"),
        ("data", "datamodules.image_classification.ImageClassificationData"),
    ):
        arguments = {"checkpoint_path": str(tmp_path / "evil.ckpt"), "weights_only": False}
        stranger = {section: {"class_path": f"{path}.load_from_checkpoint", "init_args": arguments}}
        refused(capsys, main(["fit", overlay(tmp_path, stranger)]), "load_from_checkpoint' is not imported")


def test_allow_imports_permits_a_module(cli: CommandLine, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "my_callbacks.py").write_text(
        "import lightning as L\nclass Mine(L.Callback):\n    def on_fit_start(self, *_): print('mine')\n"
    )
    options = ["--trainer.callbacks=my_callbacks.Mine", "--trainer.fast_dev_run=true"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        refused(capsys, cli("fit", *options), "'my_callbacks.Mine' is not imported", "--allow_imports my_callbacks")
        assert cli("fit", *options, "--allow_imports", "my_callbacks") == 0
    assert "mine" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--allow_imports"], "expected one argument"),
        (["--allow_imports="], "--allow_imports"),
        (["--allow_imports=*"], "only accepted"),
        (["--allow_imports=jsonargparse"], "can't be allowed"),
        (["--allow_imports=a b"], "a b"),
    ],
)
def test_bad_prefixes_of_allow_imports_are_refused(
    capsys: pytest.CaptureFixture[str], words: list[str], part: str
) -> None:
    refused(capsys, main(["fit", *words]), "--allow_imports", part)


def test_allow_imports_in_a_file_is_refused(
    cli: CommandLine, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    refused(capsys, cli("fit", overlay(tmp_path, {"allow_imports": "os"})), "allow_imports")


def test_python_tags_in_yaml_are_refused(
    cli: CommandLine, capsys: pytest.CaptureFixture[str], tmp_path: Path, canary: Path
) -> None:
    call = f"!!python/object/apply:os.system ['touch {canary}']"
    (tmp_path / "tags.yaml").write_text(f"model: {call}\n")
    refused(capsys, cli("fit", f"--config={tmp_path / 'tags.yaml'}"), "tags.yaml is not YAML")
    for value in ("2024-13-45", "0b_", 3000 * "["):  # values on which PyYAML's constructors raise other errors
        (tmp_path / "odd.yaml").write_text(f"model: {value}\n")
        refused(capsys, cli("fit", f"--config={tmp_path / 'odd.yaml'}"), "odd.yaml is not YAML")
    assert cli("fit", f"--model.backbone_args={call}") == 2
    assert cli("fit", f"--model={tmp_path / 'tags.yaml'}") == 2


def test_a_class_that_a_value_quotes_is_not_imported(
    cli: CommandLine, capsys: pytest.CaptureFixture[str], tmp_path: Path, canary: Path
) -> None:
    """A message inspects the class with the wrong key. It never imports a class that a value mentions."""
    (tmp_path / "quoted_module.py").write_text(f"open({str(canary)!r}, 'w')")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        words = "Option 'a.b' class_path 'quoted_module.Thing'"
        assert cli("fit", f"--model.tuning={words}") == 2
    assert "error: " in capsys.readouterr().err


def test_control_characters_in_messages_are_escaped(cli: CommandLine, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, cli("fit", "--data.path=/x\x1b[2J\u202e\u2028error: y"), "/x\\x1b[2J\\u202e\\u2028error: y")


# ------------------------------------------------------------------------------------------------- checkpoints, weights


@pytest.mark.parametrize("key", ["hyper_parameters", "datamodule_hyper_parameters"])
def test_other_classes_in_a_checkpoint_are_refused(
    fitted_cli: CommandLine, capsys: pytest.CaptureFixture[str], tmp_path: Path, canary: Path, key: str
) -> None:
    checkpoint = fitted_cli.checkpoint()
    checkpoint[key] = {
        "_class_path": "os.system",
        "_instantiator": "os.system",
        "command": f"touch {canary}",
    }
    path = tmp_path / "evil.ckpt"
    torch.save(checkpoint, path)
    data = ["--data.path", str(fitted_cli.data)]
    for command in ("fit", "test"):
        refused(capsys, main([command, "--ckpt_path", str(path), *data]), "is not imported")
    if key == "hyper_parameters":
        code = main(["export", str(path), "--format", "merged", "--output", str(tmp_path / "out")])
        refused(capsys, code, "'os.system' is not imported")


def test_malformed_hyperparameters_are_refused(
    fitted_cli: CommandLine, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for value in (3, [1], {"_class_path": ["a"]}):
        torch.save(fitted_cli.checkpoint() | {"hyper_parameters": value}, tmp_path / "odd.ckpt")
        code = main(["export", str(tmp_path / "odd.ckpt"), "--format", "merged", "--output", str(tmp_path / "out")])
        refused(capsys, code, "does not name its model")


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("evil.pth", "--model.weights={}"),
        ("evil.pth", "--model.backbone_args={{checkpoint_path: {}}}"),  # timm loads the file of this key
        ("evil.safetensors", "--model.weights={}"),
        ("evil.ckpt", "--ckpt_path={}"),
    ],
)
def test_a_pickle_in_place_of_weights_is_refused(
    cli: CommandLine, capsys: pytest.CaptureFixture[str], tmp_path: Path, canary: Path, name: str, option: str
) -> None:
    path = tmp_path / name
    for content in ({"state_dict": {"w": Malicious(canary)}}, Malicious(canary)):
        if isinstance(content, dict):
            torch.save(content, path)
        else:
            path.write_bytes(pickle.dumps(content))
        refused(capsys, cli("fit", option.format(path)), "model.backbone" if "args" in option else name)


def test_tensor_names_are_not_used_as_paths(
    cli: CommandLine, capsys: pytest.CaptureFixture[str], tmp_path: Path, outside: Path
) -> None:
    path = tmp_path / "evil.safetensors"
    save_file({f"../../{outside.name}/x": torch.zeros(2), f"{outside}/y": torch.zeros(2)}, path)
    refused(capsys, cli("fit", f"--model.weights={path}"), "does not fit", "unexpected")


def test_an_index_of_shards_may_not_leave_its_folder(
    text_cli: CommandLine, capsys: pytest.CaptureFixture[str], tmp_path: Path, canary: Path
) -> None:
    """The index names a shard outside of the model's folder. This shard is a pickle."""
    folder = shutil.copytree(text_cli.backbone[1], tmp_path / "model")
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    torch.save({names[0]: Malicious(canary)}, tmp_path / "evil.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../evil.bin")}
    for file in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        (folder / file).write_text(json.dumps(index))
        refused(capsys, text_cli("fit", f"--model.backbone={folder}"), "model.weights")
        (folder / file).unlink()


# ------------------------------------------------------------------------------------------------------- repositories


EVIL_MODULE = """
from pathlib import Path
Path({canary!r}).touch()
from transformers import RobertaConfig, RobertaModel, PreTrainedTokenizerFast
class Evil(RobertaModel): pass
class EvilConfig(RobertaConfig): model_type = "evil"
class EvilTokenizer(PreTrainedTokenizerFast): pass
def generate(*args, **kwargs): pass
"""


def add_generation(folder: Path, canary: Path) -> None:
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(EVIL_MODULE.format(canary=str(canary)))


def name_kernel(folder: Path, canary: Path) -> None:
    kernel = "stranger/kernel:run"
    edit_json(folder / "config.json", attn_implementation=kernel, _attn_implementation=kernel)


def name_function(folder: Path, canary: Path) -> None:
    edit_json(folder / "tokenizer_config.json", tokenizer_class="os.system", command=f"touch {canary}")


def name_class(folder: Path, canary: Path) -> None:
    (folder / "evil.py").write_text(EVIL_MODULE.format(canary=str(canary)))
    edit_json(folder / "tokenizer_config.json", tokenizer_class="evil.EvilTokenizer")


@pytest.mark.parametrize("bring", [add_generation, name_kernel, name_function, name_class])
def test_code_in_a_repository_is_not_run(
    instruction_cli: CommandLine,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    canary: Path,
    bring: Callable[[Path, Path], None],
) -> None:
    """Code of a tokenizer, generation or kernel. tests/modules/backbones tests the code of models."""
    folder = shutil.copytree(instruction_cli.backbone[1], tmp_path / "model")
    bring(folder, canary)
    assert instruction_cli("fit", f"--model.backbone={folder}", "--trainer.fast_dev_run=true") in (0, 2)
    assert "Traceback" not in capsys.readouterr().err


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "{{ raise_exception.__globals__['__builtins__']['open']('CANARY', 'w') }}",
    "{% for m in messages %}{{ (m.content | attr('format')).__self__.__class__ }}{% endfor %}"
    "{{ self.__init__.__globals__.__builtins__.open('CANARY', 'w') }}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_a_chat_template_with_code_is_refused(
    instruction_cli: CommandLine, capsys: pytest.CaptureFixture[str], tmp_path: Path, canary: Path, template: str
) -> None:
    folder = shutil.copytree(instruction_cli.backbone[1], tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template.replace("CANARY", str(canary)))
    refused(capsys, instruction_cli("fit", f"--model.backbone={folder}"), "data.template")


def test_the_name_of_a_chat_template_is_not_used_as_a_path(
    text_cli: CommandLine, capsys: pytest.CaptureFixture[str], tmp_path: Path, outside: Path
) -> None:
    folder = save_backbone(tmp_path / "model", "roberta")
    template = {"name": f"../../../{outside.name}/x", "template": "x"}
    edit_json(folder / "tokenizer_config.json", chat_template=[template, template | {"name": f"{outside}/y"}])
    refused(capsys, text_cli("fit", f"--model.backbone={folder}"), "chat template", outside.name)


# ---------------------------------------------------------------------------------------------------------------- data


def hostile_tar(path: Path, outside: Path) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name in (f"../../../../{outside.name}/x", f"{outside}/y"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO(b""))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, str(outside)
        archive.addfile(link)
        archive.addfile(tarfile.TarInfo("link/z"), io.BytesIO(b""))


def hostile_zip(path: Path, outside: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in (f"../../../../{outside.name}/x", f"{outside}/y"):
            archive.writestr(name, "a,b\n1,2\n")


@pytest.mark.parametrize(("name", "write"), [("train.csv", hostile_tar), ("train.jsonl", hostile_zip)])
def test_an_archive_in_place_of_a_table_is_refused(
    text_cli: CommandLine,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    outside: Path,
    name: str,
    write: Callable[[Path, Path], None],
) -> None:
    """The `datasets` library would unpack the archive into its cache."""
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / name, outside)
    refused(capsys, text_cli("fit", f"--data.path={folder}"), "data.")


def test_a_postscript_image_is_refused(
    cli: CommandLine, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PIL would run PostScript in Ghostscript, an interpreter."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "EPS")
    for split in ("train", "test"):
        for label in CLASSES:
            (tmp_path / "images" / split / label).mkdir(parents=True)
            for i in range(12):
                pixels = colour_image(0, np.random.default_rng(i))
                (tmp_path / "images" / split / label / f"{i}.png").write_bytes(png(pixels))
    (tmp_path / "images" / "train" / CLASSES[0] / "3.png").write_bytes(buffer.getvalue())

    def interpret(*args: object, **keys: object) -> None:
        raise AssertionError("PostScript was interpreted")

    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", interpret)
    refused(capsys, cli("fit", f"--data.path={tmp_path / 'images'}", "--data.val_fraction=0.1"), "cannot be decoded")


@pytest.mark.parametrize("content", ['{"val/loss": null, "a": "<b>", "params/total": [1]}', "{"])
def test_malformed_metrics_of_a_run_are_replaced(fitted_cli: CommandLine, content: str) -> None:
    (fitted_cli.run() / "metrics.json").write_text(content)
    assert fitted_cli("test", "--ckpt_path=last") == 0
    assert fitted_cli.metrics()["test/acc1"] >= 0


# --------------------------------------------------------------------------------------------------------------- cards

LABELS = [
    "<script>alert(1)</script>",
    "[x](javascript:alert(1)) ![y](http://z/)",
    "``` a | b `c` \n\n# d\r\n---\nlicense: mit\n```",
]


def test_labels_in_a_model_card_are_escaped(
    cli: CommandLine, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.support.small_data.CLASSES", LABELS)
    data = write_parquet(tmp_path / "da`ta<b>", {"train": 30, "test": 6})
    short = ("--trainer.limit_train_batches=1", "--trainer.max_epochs=1", "--trainer.logger=false")
    assert cli("fit", f"--data.path={data}", "--test_after_fit=true", *short) == 0
    output = tmp_path / "out"
    assert main(["export", str(cli.run()), "--format", "merged", "--output", str(output)]) == 0
    _, front, body = (output / "README.md").read_text().split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert "license" not in metadata
    assert metadata["pipeline_tag"] == "image-classification"
    values = metadata["model-index"][0]["results"][-1]["metrics"]
    assert cli.metrics()["test/acc1"] in [metric["value"] for metric in values]
    before, fence, configuration = body.partition("## Configuration\n\n")
    assert fence
    marks = configuration[: len(configuration) - len(configuration.lstrip("`"))]
    inside, after = configuration[len(marks) :].split(f"\n{marks}\n", 1)
    assert len(marks) > 3  # three backticks in a label do not end the code block
    saved = yaml.safe_load(inside.removeprefix("yaml\n"))
    assert saved["model"]["init_args"]["class_names"] == LABELS
    assert saved["data"]["init_args"]["path"] == data.name  # the folder's name without its path
    for text in (before, after):
        assert not any(mark in text for mark in ("<script", "[x]", "![", "javascript:", "``` a", "da`ta", "<b>"))
    assert "&#60;script&#62;" in before
    assert before.count("\n# ") + before.startswith("# ") == 1
    assert next(line for line in before.splitlines() if line.startswith("| Classes")).count("|") == 3


def test_names_of_metrics_in_a_model_card_are_escaped(fitted_cli: CommandLine, tmp_path: Path) -> None:
    run = fitted_cli.run()
    step = fitted_cli.checkpoint(name="best")["global_step"]
    names = {"test/subjects/high school physics": 0.25, "test/[x](javascript:alert(1)) | <b>": 0.5}
    add_evaluation(run, Evaluation("test", step, (), names))
    assert main(["export", str(run), "--format", "peft", "--output", str(tmp_path / "out")]) == 0
    metrics = (tmp_path / "out" / "README.md").read_text().partition("## Metrics")[2].partition("## Training")[0]
    assert "| test/subjects/high school physics | `0.25` |" in metrics
    assert "| test&#47;&#91;x&#93;" in metrics
    assert not any(mark in metrics for mark in ("[x]", "<b>", "javascript:"))


def test_restrictions_hold_in_every_parser_until_the_command_ends() -> None:
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--call", type=Callable)
    call = ["--call=json.dumps"]
    for prefixes in ([], ["json"], []):  # an allowed prefix ends with its context
        with restricted_imports(prefixes):
            if prefixes:
                assert parser.parse_args(call).call is json.dumps
            else:
                with pytest.raises(ArgumentError, match=r"'json.dumps' is not imported"):
                    parser.parse_args(call)
    assert main(["export", "nowhere", "--format=peft", "--output=o"]) == 2
    assert parser.parse_args(call).call is json.dumps  # the restrictions ended with `main`
