"""Data for scores of forgetting: images for nearest neighbours, texts for perplexity."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from datamodules.contract import DataKind
from datamodules.errors import CallbackError, counted
from datamodules.sources.findings import Findings
from datamodules.sources.splits import SPLITS
from modules.base import AdaptedModule
from modules.metrics.forgetting import NEIGHBOURS, image_scores, text_scores

if TYPE_CHECKING:  # a run on text imports no timm, and a run on images no transformers
    from datamodules.image_classification import ImageDataset
    from modules.image_classification import ImageClassifier
    from modules.language_modeling import LanguageModel

_log = logging.getLogger(__name__)
MOST_TOKENS = 512
IMAGES_A_BATCH = 64
Probe = Callable[[AdaptedModule], dict[str, float]]  # returns the scores of a module's backbone by name


def open_probe(module: AdaptedModule, path: str, rows: int, text_column: str) -> Probe:
    """Read the rows on which a task's backbone is scored.

    Args:
        module: The task.
        path: Images or a table of text.
        rows: Largest number of rows.
        text_column: Column of the text in a table.

    Raises:
        CallbackError: If the task has no score, or there are too few rows.
        DataError: If the data cannot be read.
    """
    if DataKind.IMAGES in module.kinds:
        return _open_images(cast("ImageClassifier", module), path, rows)
    if DataKind.INSTRUCTIONS in module.kinds:
        return _open_texts(cast("LanguageModel", module), path, rows, text_column)
    raise CallbackError(
        f"forgetting.path: {type(module).__name__} has no score of forgetting. Use ImageClassifier or LanguageModel, "
        "or leave the key out."
    )


def _sample(size: int, rows: int) -> Tensor:
    """Return a seeded sample of row numbers, in order, (at most rows,) int64."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(0))[:rows].sort().values


def _report(findings: Findings, rows: int, where: str) -> None:
    for line in findings.take_lines():
        _log.info(f"forgetting.path: {line}")
    _log.info(f"forgetting.path: the backbone is scored on {counted(rows, 'row')} of {where} before and after the fit.")


class ImageProbe:
    """Score the features of labelled images by their nearest neighbours.

    Args:
        images: The images, with the transforms of evaluation.
        mean: Mean of the backbone's preprocessing, (3,).
        std: Standard deviation of the backbone's preprocessing, (3,).
    """

    def __init__(self, images: ImageDataset, mean: Tensor, std: Tensor) -> None:
        self.images, self.mean, self.std = images, mean, std

    def __call__(self, module: AdaptedModule) -> dict[str, float]:
        """Return `knn_acc`."""
        return image_scores(module.backbone, self._batches(module), self.images.table.labels[self.images.rows])

    def _batches(self, module: AdaptedModule) -> Iterator[Tensor]:
        from datamodules.image_classification import normalise

        for numbers in torch.arange(len(self.images)).split(IMAGES_A_BATCH):
            images = torch.stack([self.images[i]["image"] for i in numbers.tolist()]).to(module.device)
            yield normalise(images, self.mean, self.std).to(module.backbone_dtype)


def _open_images(module: ImageClassifier, path: str, rows: int) -> ImageProbe:
    from torchvision.transforms import v2

    from datamodules.image_classification import ImageDataset, evaluation_steps
    from datamodules.sources.images import open_split

    findings = Findings()
    table = open_split(path, "train", None, None, findings)
    if table is None:
        raise CallbackError(
            f"forgetting.path: {path} has no training split of images. Give a data set with a training split."
        )
    chosen = _sample(len(table), rows)
    if len(chosen) <= NEIGHBOURS:
        raise CallbackError(
            f"forgetting.path: {counted(len(chosen), 'image')} of {table.where} cannot give {NEIGHBOURS} neighbours. "
            "Give more images, or raise forgetting.rows."
        )
    _report(findings, len(chosen), table.where)
    config = module.preprocessing
    images = ImageDataset(table, chosen, v2.Compose(evaluation_steps(config)))
    return ImageProbe(images, torch.tensor(config["mean"]), torch.tensor(config["std"]))


class TextProbe:
    """Score a decoder by its perplexity on texts.

    Args:
        sequences: Tokens of each text, (tokens,) int64.
    """

    def __init__(self, sequences: Sequence[Tensor]) -> None:
        self.sequences = sequences

    def __call__(self, module: AdaptedModule) -> dict[str, float]:
        """Return `loss` and `perplexity`."""
        return text_scores(module, self.sequences, module.device)


def _open_texts(module: LanguageModel, path: str, rows: int, column: str) -> TextProbe:
    from datamodules.sources.tables import check_texts, open_table

    tables = (open_table(path, SPLITS[split]) for split in ("test", "val", "train"))
    table = next((table for table in tables if table is not None), None)
    if table is None:
        raise CallbackError(f"forgetting.path: {path} has no split of text. Give a file or a directory of tables.")
    table = check_texts(table, "text_column", column)
    findings = Findings()
    for note in table.notes:
        findings.add(note)
    longest = min(MOST_TOKENS, module.position_limit or MOST_TOKENS)
    texts = table.select(_sample(len(table), rows)).data[column]
    encoded = [
        module.tokenizer(text or "", truncation=True, max_length=longest, verbose=False)["input_ids"] for text in texts
    ]
    sequences = [torch.tensor(ids) for ids in encoded if len(ids) > 1]
    if not sequences:
        raise CallbackError(
            f"forgetting.path: no row of {table.where} has two tokens of text in column {column}. Choose another "
            "forgetting.text_column."
        )
    if short := len(encoded) - len(sequences):
        findings.add(f"left out of {table.where}: {counted(short, 'row')} with fewer than two tokens")
    if cut := sum(len(ids) == longest for ids in encoded):
        findings.add(f"{counted(cut, 'row')} of {table.where} may be cut to {longest} tokens")
    _report(findings, len(sequences), table.source or table.where)
    return TextProbe(sequences)
