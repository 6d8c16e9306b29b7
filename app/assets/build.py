"""Rebuild the files of this folder; README.md describes them.

python -m app.assets.build digits                     # from scikit-learn
python -m app.assets.build backbone RUN/checkpoints/best.ckpt
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from app.run.checkpoint_io import read_checkpoint

HERE = Path(__file__).parent
TEST_SHARE = 0.2


def build_digits() -> None:
    """Write scikit-learn's copy of the UCI digits as Parquet: 8 × 8 grey PNG in `image`, 0 to 9 in `label`."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), 0 to 16 → 0 to 255
    names = [str(i) for i in range(10)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = np.arange(len(pixels))
    train, test = train_test_split(rows, test_size=TEST_SHARE, random_state=0, stratify=digits.target)
    for split, chosen in (("train", train), ("test", test)):
        columns = {
            "image": [{"bytes": _png(pixels[i]), "path": None} for i in chosen],
            "label": digits.target[chosen].tolist(),
        }
        path = HERE / "digits" / f"{split}.parquet"
        path.parent.mkdir(exist_ok=True)
        datasets.Dataset.from_dict(columns, features=features).to_parquet(str(path))


def build_backbone(checkpoint: str) -> None:
    """Write the backbone of a run with `tuning: full` as float16 safetensors, without its head."""
    state = read_checkpoint(checkpoint)["state_dict"]
    backbone = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    half = {name: tensor.to(torch.float16).contiguous() for name, tensor in backbone.items()}
    save_file(half, HERE / "vit_tiny_cifar10.safetensors")


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    commands.add_parser("digits")
    commands.add_parser("backbone").add_argument("checkpoint")
    arguments = parser.parse_args()
    if arguments.command == "digits":
        build_digits()
    else:
        build_backbone(arguments.checkpoint)
