"""Upload an export to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from datamodules.errors import UsageError, first_line

OPTION = "--push_to_hub"


def check_repository(name: str) -> None:
    """Check the name of a repository before anything is exported.

    Raises:
        UsageError: If the hub does not accept the name.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, not in __all__

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UsageError(f"{OPTION}: {name!r:.120} cannot name a repository ({error}). Give OWNER/NAME.") from error


def push_to_hub(folder: Path, name: str) -> str:
    """Upload a directory to a repository of the hub. A missing repository is created as private.

    Args:
        folder: The directory.
        name: `OWNER/NAME`, or a name below the owner of the token.

    Returns:
        The address of the repository.

    Raises:
        UsageError: If there is no token or no network, or if the hub refuses the upload.
    """
    from huggingface_hub import HfApi, get_token

    kept = f"The export is complete in {folder}"
    if get_token() is None:
        raise UsageError(f"{OPTION}: there is no token. Run `hf auth login` or set HF_TOKEN. {kept}.")
    api = HfApi()
    try:
        repository = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repository.repo_id, folder_path=folder, commit_message="Upload an adapter trained with Onesided"
        )
    except Exception as error:  # The network and the hub can raise many exceptions.
        raise UsageError(
            f"{OPTION}: {name} could not be uploaded ({first_line(error)}). {kept}; upload it later."
        ) from error
    return str(repository)
