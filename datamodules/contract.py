"""Interface between data and models: kinds of data, batches, and Protocols.

The package `modules` imports this file and `datamodules.errors`, and nothing else from `datamodules`. Each Protocol
names one ability. An object with the attributes of a Protocol has the ability, whatever its class: `isinstance(model,
TextModel)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any, Final, NotRequired, Protocol, TypedDict, final, runtime_checkable

from torch import Tensor

IGNORE_INDEX: Final = -100  # Label of tokens without loss: prompts and padding.
HIDDEN: Final = "hidden"  # Key of a batch: output of the model's frozen prefix, instead of the model's input.
MASK: Final = "attention_mask"  # Key of a batch: 1 at tokens and 0 at padding.
INPUTS: Final = ("image", "input_ids", "token_type_ids")  # Keys of a batch that `HIDDEN` replaces.


class DataKind(StrEnum):
    """Kinds of data. A model lists the kinds that its steps take. A data module names the kind of its batches."""

    IMAGES = "images"
    LABELLED_TEXTS = "labelled texts"
    SUMMARIES = "summaries"
    INSTRUCTIONS = "instructions"
    QUESTIONS = "questions"


# ------------------------------------------------------------------------------------------------------------- batches


class ImageBatch(TypedDict):
    """Images, normalised for the backbone."""

    image: NotRequired[Tensor]  # (batch, 3, height, width) float32
    hidden: NotRequired[Tensor]  # (batch, tokens, width)
    label: NotRequired[Tensor]  # (batch,) int64, or (batch, classes) float32 of blended images; not in prediction
    index: NotRequired[Tensor]  # (batch,) int64
    name: NotRequired[list[str]]  # in prediction: file or row
    error: NotRequired[list[str]]  # in prediction: why an image could not be decoded, or empty


class TextBatch(TypedDict):
    """Labelled texts, padded at the right."""

    input_ids: NotRequired[Tensor]  # (batch, tokens) int64
    hidden: NotRequired[Tensor]  # (batch, tokens, width)
    attention_mask: Tensor  # (batch, tokens) int64
    token_type_ids: NotRequired[Tensor]  # (batch, tokens) int64, of tokenizers that mark the second sentence
    label: NotRequired[Tensor]  # (batch,) int64, or float32 in regression; not in prediction
    index: Tensor  # (batch,) int64


class SummaryBatch(TypedDict):
    """Texts and their summaries, each padded at the right."""

    input_ids: Tensor  # (batch, source tokens) int64
    attention_mask: Tensor  # (batch, source tokens) int64
    labels: Tensor  # (batch, target tokens) int64, IGNORE_INDEX at padding; not in prediction
    reference: NotRequired[list[str]]  # in evaluation: the summaries as text
    index: Tensor  # (batch,) int64


@final
class InstructionBatch(TypedDict):
    """Conversations to learn, padded at the right or packed; or prompts to continue, padded at the left."""

    input_ids: NotRequired[Tensor]  # (batch, tokens) int64
    hidden: NotRequired[Tensor]  # (batch, tokens, width)
    labels: Tensor  # (batch, tokens) int64, IGNORE_INDEX at prompts and padding; not in prediction
    attention_mask: NotRequired[Tensor]  # (batch, tokens) int64; not of packed sequences
    position_ids: NotRequired[Tensor]  # (batch, tokens) int64, of packed sequences: from 0 in each conversation
    index: NotRequired[Tensor]  # (batch,) int64


@final
class QuestionBatch(TypedDict):
    """Multiple choice: questions of one subject, after the prefix that all prompts share."""

    prefix: Tensor  # (prefix tokens,) int64
    input_ids: Tensor  # (batch, tokens) int64, padded at the right
    lengths: Tensor  # (batch,) int64, without the padding
    choices: Tensor  # (choices,) int64, tokens of the letters
    answers: Tensor  # (batch,) int64, -1 if unknown
    subject: str
    index: Tensor  # (batch,) int64


# ------------------------------------------------------------------------------------- what data or a model may offer


@runtime_checkable
class HasClasses(Protocol):
    """Data or a model that may know the classes."""

    @property
    def class_names(self) -> Sequence[str] | None:
        """Names by label; empty for a regression; None if unknown."""


@runtime_checkable
class HasClassCounts(Protocol):
    """Data that count the classes of the training rows."""

    @property
    def class_counts(self) -> Sequence[int]:
        """Numbers of training rows by label, set by `setup` for a fit."""


@runtime_checkable
class HasLabelScaling(Protocol):
    """Data that measure the labels of a regression."""

    @property
    def label_scaling(self) -> Sequence[float] | None:
        """Mean and standard deviation of the training labels, set by `setup` for a fit; None in classification."""


# ------------------------------------------------------------------------------------- what data ask of a model


@runtime_checkable
class HasKinds(Protocol):
    """A model that lists the kinds of data that its steps take."""

    kinds: tuple[DataKind, ...]


@runtime_checkable
class ImageModel(Protocol):
    """A model of images."""

    preprocessing: dict[str, Any]  # timm's input_size, interpolation, mean, std, crop_pct and crop_mode


@runtime_checkable
class TextModel(Protocol):
    """A model of texts."""

    tokenizer: Any
    position_limit: int | None  # Maximum tokens of a text; None for no limit.


class Prefix(Protocol):
    """The part of a backbone that training does not change, so that data modules may cache its output."""

    key: str  # Digest of the prefix: its weights, configuration and libraries.

    def states(self, batch: Any) -> Tensor:
        """Return the output (batch, tokens, width) for a batch."""


@runtime_checkable
class HasFrozenPrefix(Protocol):
    """A model that may take the output of its frozen prefix as input."""

    def frozen_prefix(self) -> Prefix:
        """Return the prefix.

        Raises:
            ModelError: If the model has no frozen prefix.
        """


# ------------------------------------------------------------------------------------- what a model asks of data


@runtime_checkable
class HasKind(Protocol):
    """Data that name the kind of their batches."""

    kind: DataKind


@runtime_checkable
class HasMetrics(Protocol):
    """Data that name the metrics by which a model is scored."""

    @property
    def metrics(self) -> Sequence[str]:
        """Names of `modules.metrics.text_metrics`."""


@runtime_checkable
class HasSets(Protocol):
    """Data whose splits consist of several sets, such as MNLI's matched and mismatched."""

    @property
    def set_names(self) -> Mapping[str, list[str]]:
        """Names of the sets of `val` and `test`, in the order of the loaders."""


@runtime_checkable
class HasDomains(Protocol):
    """Data with test domains other than the training domain."""

    @property
    def domain_names(self) -> Sequence[str]:
        """Names of the domains, in the order of the loaders after the first."""


@runtime_checkable
class HasPrompts(Protocol):
    """Data that write prompts with a template."""

    @property
    def prompt_template(self) -> str:
        """Jinja template of a whole conversation."""

    @property
    def response_end(self) -> int:
        """Token with which the template ends a response."""


@runtime_checkable
class HasPacking(Protocol):
    """Data that may put several conversations into one sequence to train on."""

    packing: bool


# ------------------------------------------------------------------------------------- what commands ask of data


@runtime_checkable
class HasPredictionFiles(Protocol):
    """Data that name the files of their predictions and complete the rows of these files."""

    @property
    def prediction_files(self) -> Sequence[str]:
        """A file name for each loader; the suffix decides between CSV, TSV and JSONL."""

    def complete_prediction(self, row: dict[str, Any], file: int) -> dict[str, Any]:
        """Return the row to write for a predicted row; `file` is the number of the loader."""


@runtime_checkable
class HasPaths(Protocol):
    """A class of data that can check its paths before a backbone is loaded."""

    @classmethod
    def check_paths(cls, command: str, keys: Mapping[str, Any]) -> None:
        """Check, without reading rows, the paths that a command reads.

        Args:
            command: `fit`, `validate`, `test` or `predict`.
            keys: Arguments of the constructor.

        Raises:
            DataError: If a path that looks local does not exist, or is of the wrong kind.
        """


@runtime_checkable
class HasTestSplit(Protocol):
    """Data that can check their test split before a long training."""

    def check_test_split(self) -> None:
        """Check that there is a test split. The next fit then reads the test split before training.

        Raises:
            DataError: If there is no test split.
        """
