"""conf/slurm.sbatch: resume of the job's run and requeue after SIGTERM, with replacements of srun and scontrol."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "conf" / "slurm.sbatch", tmp_path)
    saves = "for file in $(cat saves); do mkdir -p ${file%/*}; touch -d '1 minute' $file; done; exit $(cat code)"
    for name, code in (("srun", saves), ("scontrol", "exit 0")):
        file = tmp_path / name
        file.write_text(f'#!/bin/bash\necho "$@" >> {name}.log\n{code}\n')
        file.chmod(0o755)
    return tmp_path


LAST = "runs/slurm-7/version_0/checkpoints/last.ckpt"


def submit(cluster: Path, code: int, saves: str = "") -> int:
    """Run the batch script. Its srun writes the files `saves` and ends with `code`."""
    (cluster / "code").write_text(str(code))
    (cluster / "saves").write_text(saves)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "4"}
    path = {"PATH": f"{cluster}{os.pathsep}{os.environ['PATH']}"}
    words = ["bash", "slurm.sbatch", "conf/vit_cifar.yaml", "--data.batch_size", "8"]
    return subprocess.run(words, cwd=cluster, env={**os.environ, **path, **job}, check=False).returncode


def test_sigterm_requeues_and_the_next_attempt_resumes(cluster: Path) -> None:
    assert submit(cluster, 143, LAST) == 143
    assert (cluster / "scontrol.log").read_text() == "requeue 7\n"
    assert submit(cluster, 0, LAST) == 0
    first, second = (cluster / "srun.log").read_text().splitlines()
    assert "--config conf/vit_cifar.yaml --config conf/ddp.yaml --trainer.num_nodes 2 --trainer.devices 4" in first
    assert "--ckpt_path" not in first
    assert second.endswith("--trainer.default_root_dir runs/slurm-7 --ckpt_path last --data.batch_size 8")
    # with --kill-on-bad-exit, the SIGTERM to the other tasks would turn an error into 143
    assert all("--kill-on-bad-exit=0" in line for line in (first, second))
    assert (cluster / "scontrol.log").read_text() == "requeue 7\n"


def test_an_attempt_without_progress_is_not_requeued(cluster: Path) -> None:
    assert submit(cluster, 143) == 143
    file = cluster / LAST
    file.parent.mkdir(parents=True)
    file.touch()
    os.utime(file, (0, 0))  # written by an earlier attempt
    assert submit(cluster, 143) == 143
    assert not (cluster / "scontrol.log").exists()


@pytest.mark.parametrize("code", [1, 2, 137])
def test_an_error_is_not_requeued(cluster: Path, code: int) -> None:
    assert submit(cluster, code, LAST) == code
    assert not (cluster / "scontrol.log").exists()
