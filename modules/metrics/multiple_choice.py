"""Multiple-choice accuracy in MMLU's groups."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

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
_END = b"\0"  # Terminates a subject's name.


class MultipleChoiceAccuracy(Metric):
    """Share of questions whose likeliest letter is the answer: overall, by subject and by MMLU category.

    The state has a name and two counts for each update, so that processes may evaluate different subjects.
    """

    full_state_update = False
    names: list[Tensor] | Tensor
    counts: list[Tensor] | Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("names", [], dist_reduce_fx="cat")  # UTF-8 bytes, each name terminated by `_END`.
        self.add_state("counts", [], dist_reduce_fx="cat")  # Pairs of hits and questions.

    def update(self, log_probabilities: Tensor, answers: Tensor, subject: str) -> None:
        """Add questions of one subject.

        Args:
            log_probabilities: Log-probability of each letter, (batch, n_choices).
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

        `acc` is the accuracy over all questions, and `acc_stderr` its standard error as a proportion. `acc_subjects` is
        the mean over subjects. `acc_humanities`, `acc_stem`, `acc_social_sciences` and `acc_other` are the accuracies
        of MMLU's categories that have questions. With several subjects, `subjects/NAME` is the accuracy of a subject.
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
        """Return the numbers of hits and questions (2,) int64 by subject."""
        names = bytes(dim_zero_cat(self.names).tolist()).split(_END)[:-1]
        counts: dict[str, Tensor] = {}
        for name, pair in zip(names, dim_zero_cat(self.counts).view(-1, 2), strict=True):
            counts[name.decode()] = counts.get(name.decode(), 0) + pair
        return dict(sorted(counts.items()))
