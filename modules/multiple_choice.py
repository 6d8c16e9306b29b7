"""Multiple choice by log-likelihood: a decoder's log-probability of each letter, and accuracy as MMLU reports it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from datamodules.contract import QuestionBatch
from modules.transformers_backbone import selected_logits

_SUBJECTS = {  # categories.py of Hendrycks et al. 2021, "Measuring Massive Multitask Language Understanding"
    "humanities": """
        formal_logic high_school_european_history high_school_us_history high_school_world_history international_law
        jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory professional_law
        world_religions
    """,
    "stem": """
        abstract_algebra astronomy college_biology college_chemistry college_computer_science college_mathematics
        college_physics computer_security conceptual_physics electrical_engineering elementary_mathematics
        high_school_biology high_school_chemistry high_school_computer_science high_school_mathematics
        high_school_physics high_school_statistics machine_learning
    """,
    "social_sciences": """
        econometrics high_school_geography high_school_government_and_politics high_school_macroeconomics
        high_school_microeconomics high_school_psychology human_sexuality professional_psychology public_relations
        security_studies sociology us_foreign_policy
    """,
    "other": """
        anatomy business_ethics clinical_knowledge college_medicine global_facts human_aging management marketing
        medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology
    """,
}
CATEGORIES = {subject: category for category, subjects in _SUBJECTS.items() for subject in subjects.split()}
_END = b"\0"  # of a subject's name among bytes


class _SharedKeys(Cache):
    """Keys and values of a prefix (1, heads, P, width) that batches of any size read, and never add to."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Return keys and values of the prefix with a batch's behind them, (batch, heads, P + tokens, width)."""
        layer = self.layers[layer_idx]
        pairs = ((layer.keys, key_states), (layer.values, value_states))  # type: ignore[union-attr]
        return tuple(torch.cat([kept.expand(len(new), -1, -1, -1), new], dim=-2) for kept, new in pairs)  # type: ignore[union-attr]


class PrefixCache:
    """Keys and values of the prefix that batches share, computed once and kept while prefix and weights are the same.

    Weights that change in place are noticed: an optimizer's step, a loaded checkpoint. After any other change, such as
    adapters that are switched off, use a new cache.
    """

    def __init__(self) -> None:
        self._prefix: Tensor | None = None
        self._weights = -1
        self._keys: _SharedKeys | None = None

    def keys_of(self, model: PreTrainedModel, prefix: Tensor) -> Cache | None:
        """Return keys and values of a prefix, (P,) int64.

        Returns:
            A cache for batches of any size; None if the model keeps a state that cannot be shared in this way.
        """
        weights = sum(p._version for p in model.parameters())
        known = self._prefix is not None and self._prefix.device == prefix.device and self._weights == weights
        if not (known and torch.equal(self._prefix, prefix)):  # type: ignore[arg-type]
            self._keys = None  # before the next one's are there
            self._keys, self._prefix, self._weights = _prefix_keys(model, prefix), prefix.clone(), weights
        return self._keys


def _prefix_keys(model: PreTrainedModel, prefix: Tensor) -> _SharedKeys | None:
    cache = DynamicCache(config=model.config)
    # others, of recurrent layers say, hold more than keys and values, or hold it compressed
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return None
    model.base_model(input_ids=prefix[None], past_key_values=cache, use_cache=True)
    filled = all(layer.is_initialized for layer in cache.layers) and cache.get_seq_length() == len(prefix)  # type: ignore[union-attr]
    return _SharedKeys(layers=cache.layers) if filled else None


@torch.no_grad()
def choice_log_probabilities(model: PreTrainedModel, batch: QuestionBatch, cache: PrefixCache) -> Tensor:
    """Return the log-probability of each letter behind each question, among all tokens of the vocabulary.

    Args:
        model: A decoder, in eval mode.
        batch: Questions of one subject.
        cache: Cache of the prefix.

    Returns:
        (batch, n_choices) float32.
    """
    prefix, tokens, lengths = batch["prefix"], batch["input_ids"], batch["lengths"]
    keys = cache.keys_of(model, prefix) if len(prefix) else None
    start = len(prefix) if keys is not None else 0
    if keys is None:
        tokens = torch.cat([prefix.expand(len(tokens), -1), tokens], dim=1)  # (batch, P + tokens)
        lengths = lengths + len(prefix)
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    is_token = positions < lengths[:, None]  # (batch, tokens)
    logits = selected_logits(  # (batch, vocabulary)
        model,
        positions == lengths[:, None] - 1,
        input_ids=tokens,
        attention_mask=torch.cat([is_token.new_ones(len(tokens), start), is_token], dim=1).long(),
        position_ids=(start + positions).expand(len(tokens), -1),
        past_key_values=keys,
        use_cache=keys is not None,
    )
    return logits.log_softmax(-1)[:, batch["choices"]]


class MultipleChoiceAccuracy(Metric):
    """Share of questions whose likeliest letter is the answer: of all, by subject, and by MMLU's categories.

    The state is a name and two counts for each update, so that processes may have seen different subjects.
    """

    full_state_update = False
    names: list[Tensor] | Tensor
    counts: list[Tensor] | Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("names", [], dist_reduce_fx="cat")  # uint8, each ends with a zero
        self.add_state("counts", [], dist_reduce_fx="cat")  # hits and questions in turn

    def update(self, log_probabilities: Tensor, answers: Tensor, subject: str) -> None:
        """Add questions of one subject.

        Args:
            log_probabilities: Of each letter, (batch, n_choices).
            answers: Index of the right letter, (batch,) int64.
            subject: Subject of the questions.
        """
        assert isinstance(self.names, list)
        assert isinstance(self.counts, list)
        hits = (log_probabilities.argmax(-1) == answers).sum()
        self.names.append(torch.tensor(list(subject.encode() + _END), dtype=torch.uint8, device=hits.device))
        self.counts.append(torch.stack([hits, hits.new_tensor(len(answers))]))

    def compute(self) -> dict[str, Tensor]:
        """Return accuracies by name, each in [0, 1].

        `acc` is over all questions, with its standard error `acc_stderr` (of a proportion); `acc_subjects` the mean
        over subjects; `acc_humanities`, `acc_stem`, `acc_social_sciences` and `acc_other` are over the questions of
        MMLU's categories, as far as they occur; `subjects/NAME` over those of a subject, if there are several.
        """
        counts = self._by_subject()

        def share(subjects: list[str]) -> Tensor:
            hits, questions = torch.stack([counts[subject] for subject in subjects]).sum(0)
            return hits / questions

        groups = {"acc": list(counts)}
        groups |= {f"acc_{name}": [s for s in counts if CATEGORIES.get(s) == name] for name in _SUBJECTS}
        groups |= {f"subjects/{subject}": [subject] for subject in counts if len(counts) > 1}
        values = {name: share(subjects) for name, subjects in groups.items() if subjects}
        questions = torch.stack(list(counts.values())).sum(0)[1]
        values["acc_stderr"] = (values["acc"] * (1 - values["acc"]) / questions).sqrt()
        values["acc_subjects"] = torch.stack([share([subject]) for subject in counts]).mean()
        return values

    def _by_subject(self) -> dict[str, Tensor]:
        """Return the numbers of hits and of questions of each subject, (2,) int64."""
        names = bytes(dim_zero_cat(self.names).tolist()).split(_END)[:-1]
        counts: dict[str, Tensor] = {}
        for name, pair in zip(names, dim_zero_cat(self.counts).view(-1, 2), strict=True):
            counts[name.decode()] = counts.get(name.decode(), 0) + pair
        return dict(sorted(counts.items()))
