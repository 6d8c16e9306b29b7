"""Outcome of a sweep: chosen points, confirmed values and costs, read from the table of trials."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any, Literal

import numpy as np
import pandas as pd

from app.sweep.facts import PlanFacts
from app.sweep.statistics import Mean, PairedDifference, mean_over_seeds, paired_difference

Kind = Literal["one side", "both", "head", "full", "other"]
TRIAL = ("variant", "phase", "point", "seed", "state", "error", "run", "chosen", "curve_steps", "curve_values")
COSTS = {  # column, and its name in a sentence
    "params/trainable": "trained parameters",
    "adapter/bytes": "adapter file size",
    "time/fit_seconds": "fit time",
    "memory/peak_bytes": "peak memory",
}
LOWER_IS_BETTER = ("loss", "perplexity", "error", "mse", "mae")  # parts of a metric's name
NO_SCORE = ("time/", "memory/", "params/", "adapter/")  # prefixes of costs


@dataclass(frozen=True)
class Scale:
    """Direction, unit and digits of a metric.

    Args:
        metric: Full name, such as `test/score`.
        hundredfold: True for scores that are shown times 100, so that differences are in points.
        higher_is_better: Direction.
        digits: Decimal places.
    """

    metric: str
    hundredfold: bool
    higher_is_better: bool
    digits: int

    @property
    def factor(self) -> float:
        """Return the factor for showing a value."""
        return 100.0 if self.hundredfold else 1.0

    @property
    def unit(self) -> str:
        """Return the unit of a difference, with a space before it."""
        return " points" if self.hundredfold else ""

    @property
    def name(self) -> str:
        """Return the metric's name with its factor, for a column or an axis."""
        return f"{self.metric} × 100" if self.hundredfold else self.metric

    @property
    def direction(self) -> str:
        """Return the direction in words."""
        return "higher is better" if self.higher_is_better else "lower is better"

    def text(self, value: float) -> str:
        """Return a value as text."""
        return f"{value * self.factor:.{self.digits}f}".replace("-", "−")

    def signed(self, value: float) -> str:
        """Return a difference as text, with its sign."""
        return f"{value * self.factor:+.{self.digits}f}".replace("-", "−")

    def mean(self, mean: Mean) -> str:
        """Return a mean ± its standard error; the mean alone for one seed, a dash without seeds."""
        if not mean.seeds:
            return "–"
        return self.text(mean.value) + ("" if mean.error is None else f" ± {self.text(mean.error)}")


class Outcome:
    """Trials of a sweep, with the figures that the report shows.

    Args:
        facts: The plan.
        results: One row for each trial. Columns may be missing.
    """

    def __init__(self, facts: PlanFacts, results: pd.DataFrame) -> None:
        self.facts = facts
        self.keys = list(facts.search)
        numbers = list(dict.fromkeys([facts.metric, *facts.report, *COSTS]))
        columns = [*TRIAL, *(f"search/{key}" for key in self.keys), *numbers]
        self.trials = results.reindex(columns=list(dict.fromkeys([*results.columns, *columns])))
        for name in numbers:
            self.trials[name] = pd.to_numeric(self.trials[name], errors="coerce").astype(float)
        self.trials[numbers] = self.trials[numbers].replace([np.inf, -np.inf], np.nan)
        self.trials["chosen"] = self.trials["chosen"].eq(True)
        self.variant_keys = {variant.name: variant.keys for variant in facts.variants}
        self.variants = list(self.variant_keys)

    def state(self, *states: str) -> pd.DataFrame:
        """Return the trials in these states."""
        return self.trials[self.trials["state"].isin(states)]

    @cached_property
    def complete(self) -> pd.DataFrame:
        """Return the complete trials."""
        return self.state("complete")

    def chosen(self, variant: str) -> pd.Series[Any] | None:
        """Return a trial at the variant's chosen point, or None before the choice."""
        rows = self.trials[(self.trials["variant"] == variant) & self.trials["chosen"]]
        return None if rows.empty else rows.iloc[0]

    def at_choice(self, variant: str, phase: str) -> pd.DataFrame:
        """Return the variant's trials of a phase at its chosen point.

        Trials of a previous choice are left out: the choice can change when values are added to the search. Confirming
        seeds that not all variants had time for are left out too.
        """
        chosen = self.chosen(variant)
        point = None if chosen is None else chosen["point"]
        trials = self.trials
        rows = trials[(trials["variant"] == variant) & (trials["phase"] == phase) & (trials["point"] == point)]
        left_out = self.facts.time.left_out_seeds if phase == "confirm" and self.facts.time else []
        return rows[~rows["seed"].isin(left_out)]

    def best_selected(self, variant: str) -> tuple[float, pd.Series[Any]] | None:
        """Return the best mean of the selecting metric over all selecting seeds, and a trial at its point."""
        rows = self.complete[(self.complete["variant"] == variant) & (self.complete["phase"] == "select")]
        means = rows.groupby("point", sort=False)[self.facts.metric].agg(["mean", "count"])
        means = means.loc[means["count"] == len(self.facts.select_seeds), "mean"].dropna()
        if means.empty:
            return None
        point = means.idxmax() if self.facts.mode == "max" else means.idxmin()
        return float(means[point]), rows[rows["point"] == point].iloc[0]

    def confirmed(self, variant: str, metric: str) -> pd.Series[float]:
        """Return a metric's values by seed, for the table."""
        rows = self.at_choice(variant, self.phase)
        rows = rows[(rows["state"] == "complete") & rows[metric].notna()]
        return pd.Series(rows[metric].to_numpy(float), index=rows["seed"].to_numpy())

    def mean(self, variant: str, metric: str) -> Mean:
        """Return a metric's mean over the confirmed seeds."""
        return mean_over_seeds(self.confirmed(variant, metric))

    def cost(self, variant: str, metric: str) -> float | None:
        """Return the median of a cost over the confirmed seeds, or None if no trial logged the cost."""
        values = self.confirmed(variant, metric)
        return None if values.empty else float(values.median())

    @cached_property
    def ranked(self) -> list[str]:
        """Return the variants that have a confirmed value of the first metric, best mean first."""
        means = {variant: self.mean(variant, self.metric) for variant in self.variants}
        sign = -1 if self.scale(self.metric).higher_is_better else 1
        return sorted((v for v in self.variants if means[v].seeds), key=lambda v: sign * means[v].value)

    @property
    def metric(self) -> str:
        """Return the metric that decides the comparison: the first of the table."""
        return self.report[0]

    @property
    def report(self) -> tuple[str, ...]:
        """Return the metrics of the table; the selecting metric if the plan names no metric."""
        return self.facts.report or (self.facts.metric,)

    @property
    def phase(self) -> Literal["select", "confirm"]:
        """Return the phase of the trials in the table: `confirm`, or `select` without confirming seeds."""
        return "confirm" if self.facts.confirm_seeds else "select"

    @cached_property
    def differences(self) -> list[PairedDifference]:
        """Return the paired differences of all pairs, each the better mean minus the worse one."""
        return [self.difference(first, second) for first, second in combinations(self.ranked, 2)]

    def difference(self, first: str, second: str) -> PairedDifference:
        """Compare two variants by the first metric over the seeds that both have."""
        values, others = self.confirmed(first, self.metric), self.confirmed(second, self.metric)
        return paired_difference(first, values, second, others)

    def verdict(self, difference: PairedDifference) -> int:
        """Return 1 if the first variant is clearly better, -1 if clearly worse, 0 if the interval contains zero."""
        return difference.sign if self.scale(self.metric).higher_is_better else -difference.sign

    def kind(self, variant: str) -> Kind:
        """Return the kind of a variant: the parts that its keys train."""
        keys = {**self.facts.set, **self.variant_keys[variant]}
        tuning, train = keys.get("model.tuning", "adapter"), keys.get("model.adapter.train")
        if tuning in ("head", "full"):
            return "head" if tuning == "head" else "full"
        if train in ("A", "B"):
            return "one side"
        return "both" if train == "both" else "other"

    @cached_property
    def lora(self) -> str | None:
        """Return the confirmed variant `lora`, or else the first confirmed variant that trains both factors."""
        both = [variant for variant in self.variants if self.kind(variant) == "both" and variant in self.ranked]
        return "lora" if "lora" in both else next(iter(both), None)

    def scale(self, metric: str) -> Scale:
        """Return a metric's scale. Scores between -1 and 1 are shown times 100; losses and costs are not."""
        name = metric.rpartition("/")[2]
        values = self.trials[metric].abs()
        lower = any(part in name for part in LOWER_IS_BETTER) or metric.startswith(NO_SCORE)
        hundredfold = not lower and bool((values.dropna() <= 1).all())
        if name == self.facts.metric.rpartition("/")[2]:
            lower = self.facts.mode == "min"
        largest = 0.0 if values.isna().all() else float(values.median())
        digits = 2 if hundredfold else next((d for bound, d in ((100, 1), (10, 2)) if largest >= bound), 4)
        return Scale(metric, hundredfold, not lower, digits)

    def short(self, key: str) -> str:
        """Return the last part of a searched key, or the whole key if two keys share the last part."""
        last = key.rpartition(".")[2]
        return last if sum(other.rpartition(".")[2] == last for other in self.keys) == 1 else key

    def point(self, trial: pd.Series[Any]) -> str:
        """Return a trial's searched values as text, `learning_rate 0.002`."""
        values = [(self.short(key), trial[f"search/{key}"]) for key in self.keys]
        return ", ".join(f"{key} {value_text(value)}" for key, value in values if is_value(value)) or "no searched key"


def is_value(value: Any) -> bool:
    """Return False for a missing cell (None or NaN)."""
    return isinstance(value, list | tuple | dict) or not pd.isna(value)


def value_text(value: Any) -> str:
    """Return a searched value as text."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def count_text(count: int) -> str:
    """Return a small number as a word."""
    words = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    return words[count] if count < len(words) else str(count)


def plural(count: int, noun: str) -> str:
    """Return a number with its noun: `five seeds`, `one seed`."""
    return f"{count_text(count)} {noun}{'' if count == 1 else 's'}"


def join_words(words: Sequence[str]) -> str:
    """Return `a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
