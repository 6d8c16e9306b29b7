"""Upload of an export to the hub. The local directory stays when the upload fails."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, RepoUrl

from app.cli import main
from tests.app.conftest import CommandLine
from tests.support.refusals import refused

NAME = "someone/cola-adapter"


class FakeHub:
    """Replace the two methods of HfApi that an upload calls, and record their arguments."""

    def __init__(self) -> None:
        self.created: list[tuple[str, dict[str, Any]]] = []
        self.files: dict[str, bytes] = {}
        self.error: Exception | None = None

    def create_repo(self, _: HfApi, repo_id: str, **keys: Any) -> RepoUrl:
        if self.error is not None:
            raise self.error
        self.created.append((repo_id, keys))
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, _: HfApi, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        assert repo_id == NAME
        assert "Onesided" in commit_message
        self.files = {file.name: file.read_bytes() for file in folder_path.iterdir()}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr(HfApi, "create_repo", lambda api, *args, **keys: fake.create_repo(api, *args, **keys))
    monkeypatch.setattr(HfApi, "upload_folder", lambda api, **keys: fake.upload_folder(api, **keys))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_token")
    return fake


def push(run: Path, output: Path, name: str = NAME) -> int:
    return main(["export", str(run), "--format", "peft", "--output", str(output), "--push_to_hub", name])


def test_the_directory_is_uploaded_to_a_private_repository(
    hub: FakeHub, fitted_text_cli: CommandLine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "peft"
    assert push(fitted_text_cli.run(), output) == 0
    assert hub.created == [(NAME, {"private": True, "exist_ok": True})]
    assert hub.files == {file.name: file.read_bytes() for file in output.iterdir()}
    assert f"Uploaded to https://huggingface.co/{NAME}\n" in capsys.readouterr().out
    (code,) = re.findall(r"```python\n(.*?)```", (output / "README.md").read_text(), re.DOTALL)
    assert f"ADAPTER = '{NAME}'\n" in code
    backbone = Path(fitted_text_cli.backbone[1])
    assert f"BACKBONE = '{backbone.name}'  # The backbone was read from a local path: set its path here.\n" in code
    machine = [str(folder).encode() for folder in (backbone.parent, fitted_text_cli.root, fitted_text_cli.data.parent)]
    assert [name for name, content in hub.files.items() if any(path in content for path in machine)] == []
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == backbone.name


@pytest.mark.parametrize(
    "error", [RuntimeError("Name or service not known"), OSError("offline mode")], ids=["network", "offline"]
)
def test_a_failed_upload_keeps_the_directory(
    hub: FakeHub, fitted_text_cli: CommandLine, tmp_path: Path, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    hub.error = error
    code = push(fitted_text_cli.run(), tmp_path / "peft")
    refused(capsys, code, "--push_to_hub", NAME, str(error), f"The export is complete in {tmp_path / 'peft'}")
    assert (tmp_path / "peft" / "adapter_model.safetensors").is_file()


def test_without_a_token_the_directory_is_kept(
    hub: FakeHub,
    fitted_text_cli: CommandLine,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    code = push(fitted_text_cli.run(), tmp_path / "peft")
    refused(capsys, code, "--push_to_hub: there is no token", "HF_TOKEN", str(tmp_path / "peft"))
    assert hub.created == []
    assert (tmp_path / "peft" / "README.md").is_file()


def test_a_name_that_the_hub_refuses_exports_nothing(
    hub: FakeHub, fitted_text_cli: CommandLine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = push(fitted_text_cli.run(), tmp_path / "peft", "a/b/c")
    refused(capsys, code, "--push_to_hub: 'a/b/c' cannot name a repository")
    assert not (tmp_path / "peft").exists()
