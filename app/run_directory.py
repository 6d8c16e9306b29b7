"""Where a run writes: runs/<recipe>/version_K, a new one for each run, the same one on resume."""

from __future__ import annotations

from pathlib import Path

from app.checkpoint_io import CheckpointError

CHECKPOINTS = "checkpoints"


def versions(root: Path) -> list[Path]:
    """The run directories below a root, oldest first."""
    found = [p for p in root.glob("version_*") if p.is_dir() and p.name.removeprefix("version_").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("version_")))


def new_run_directory(root: Path) -> Path:
    """Create the next version directory below a root; two runs that start at once get two."""
    existing = versions(root)
    number = int(existing[-1].name.removeprefix("version_")) + 1 if existing else 0
    while True:
        path = root / f"version_{number}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return path


def resolve_checkpoint(ckpt_path: str, root: Path, prefer_best: bool) -> Path:
    """The file that a `--ckpt_path` means.

    Args:
        ckpt_path: A checkpoint file, a run directory, or `last`: last.ckpt of the newest run below the root that has
            one.
        root: Directory of the recipe's runs.
        prefer_best: Whether a run directory means its best checkpoint, if it has one, rather than its last.

    Raises:
        CheckpointError: If there is no such checkpoint.
    """
    if ckpt_path == "last":
        candidates = [v / CHECKPOINTS / "last.ckpt" for v in reversed(versions(root))]
        found = next((c for c in candidates if c.is_file()), None)
        if found is None:
            raise CheckpointError(f"ckpt_path: no run below {root} has a checkpoint yet; give a file, or start anew.")
        return found
    path = Path(ckpt_path)
    if path.is_dir():
        best = path / CHECKPOINTS / "best.ckpt"
        return best if prefer_best and best.is_file() else path / CHECKPOINTS / "last.ckpt"
    return path


def run_of_checkpoint(checkpoint: Path) -> Path | None:
    """The run directory that a checkpoint lies in, if it lies in one."""
    return checkpoint.parent.parent if checkpoint.parent.name == CHECKPOINTS else None
