"""Express the findings of a sweep in words, none stronger than its intervals allow."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from app.console import seconds_text
from app.sweep.facts import PlanFacts
from app.sweep.outcome import COSTS, Outcome, count_text, join_words, plural
from app.sweep.statistics import STUDENT_SEEDS, PairedDifference
from datamodules.errors import counted

PRUNING = {  # names of the rules that stop trials early
    "median": "the median rule",
    "halving": "successive halving",
    "hyperband": "hyperband",
}


def introduction(facts: PlanFacts, results: pd.DataFrame) -> str:
    """Return a paragraph on the variants, the recipe, and the seeds that chose and confirmed."""
    outcome = Outcome(facts, results)
    settings = ", ".join(f"{key} = {value}" for key, value in facts.set.items())
    searched = join_words([outcome.short(key) for key in outcome.keys]) if outcome.keys else "nothing"
    extreme = "highest" if facts.mode == "max" else "lowest"
    sentences = [
        f"This sweep compares {plural(len(facts.variants), 'variant')} ({join_words(outcome.variants)}) on "
        f"{join_words(facts.base)}{f' with {settings}' if settings else ''}.",
        f"For each variant, {_seeds(facts.select_seeds)} chose {searched} by the {extreme} mean {facts.metric}.",
    ]
    if facts.prune != "none":
        sentences.append(f"Trials with poor values could be stopped early ({PRUNING[facts.prune]}).")
    if facts.counted_seeds:
        sentences.append(f"The rows of the table come from other seeds: {_numbers(facts.counted_seeds)}.")
    elif facts.confirm_seeds:
        sentences.append("Other seeds will confirm the choice, but no such seed is complete for all variants yet.")
    else:
        sentences.append(
            "No other seeds confirm the choice. The rows of the table are the trials that made the choice, so they "
            "flatter every variant."
        )
    if any(metric.startswith("val/") for metric in outcome.report):
        sentences.append("The table reports validation data, which made the choice too.")
    scaled = [metric for metric in outcome.report if outcome.scale(metric).hundredfold]
    if scaled and not outcome.complete.empty:
        sentences.append(f"Values of {join_words(scaled)} are shown times 100, and their differences are in points.")
    return " ".join(sentences)


def findings(facts: PlanFacts, results: pd.DataFrame) -> list[str]:
    """Return the findings of the sweep and their certainty, one paragraph each."""
    outcome = Outcome(facts, results)
    paragraphs = [*time_used(facts, results), *_progress(outcome)]
    if outcome.ranked:
        paragraphs += [
            *_enough(outcome),
            *_order(outcome),
            *(_compared(outcome, side, outcome.lora) for side in _sides(outcome) if outcome.lora),
            *_head(outcome),
            *_cheapest(outcome),
            *_chance(outcome),
        ]
    return [*paragraphs, *_gaps(outcome)]


def time_used(facts: PlanFacts, results: pd.DataFrame) -> list[str]:
    """Return sentences about the completed work, if the sweep has ended because of its time limit."""
    time = facts.time
    if time is None or not time.is_over:
        return []
    outcome, minutes = Outcome(facts, results), f"{time.minutes:g} minute{'' if time.minutes == 1 else 's'}"
    done, planned = len(facts.counted_seeds), len(facts.confirm_seeds)
    if not any(outcome.chosen(variant) is not None for variant in outcome.variants):
        complete = plural(len(outcome.complete), "trial")
        verb = "is" if len(outcome.complete) == 1 else "are"
        sentences = [f"The time limit of {minutes} ended the sweep before the choice: {complete} {verb} complete."]
        next_step = "The choice"
    else:
        seeds = f"{count_text(done) if done else 'none'} of {plural(planned, 'confirming seed')}"
        too_few = f": too few for an interval, which needs {count_text(STUDENT_SEEDS)}" if done < STUDENT_SEEDS else ""
        sentences = [f"The time limit of {minutes} was enough for {seeds}{too_few}."]
        next_step = "Another seed of all variants"
    in_part = outcome.complete[outcome.complete["phase"] == "confirm"]["seed"]
    if cut := [seed for seed in time.left_out_seeds if (in_part == seed).any()]:
        sentences.append(f"The table leaves out {_seeds(cut)}, which not all variants have finished.")
    if time.missing_seconds is not None:
        sentences.append(f"{next_step} would take about {seconds_text(time.missing_seconds)} more.")
    sentences.append("The same command continues the sweep.")
    return [" ".join(sentences)]


def _progress(outcome: Outcome) -> list[str]:
    """Return sentences about trials that are still to run, and about a sweep without results to compare."""
    sentences = []
    failed, left = outcome.state("failed"), outcome.state("running", "waiting")
    if not outcome.facts.finished and not (outcome.facts.time and outcome.facts.time.is_over):
        count = f"{plural(len(left), 'trial')} of {len(outcome.trials)} " if len(left) else "some trials "
        verb = "is" if len(left) == 1 else "are"
        sentences.append(f"The sweep has not finished: {count}{verb} still to run. All numbers may change.")
    if outcome.complete.empty:
        if len(failed) and outcome.facts.finished:
            error = failed["error"].dropna().mode()
            reason = f" The most frequent error: {error[0]}" if len(error) else ""
            sentences.append(f"No trial succeeded, so nothing can be compared. {len(failed)} failed.{reason}")
        else:
            sentences.append("No trial is complete yet, so nothing can be compared.")
    elif not outcome.ranked:
        sentences.append(
            f"No trial has confirmed a choice with {outcome.metric} yet. The trials that made the choice are no fair "
            "comparison, since each variant shows the luckiest of its points."
        )
        sentences += _selected(outcome)
    return sentences


def _selected(outcome: Outcome) -> list[str]:
    """List the best value of each variant on the selecting seeds, if there are no confirmed values."""
    scale = outcome.scale(outcome.facts.metric)
    best = {variant: outcome.best_selected(variant) for variant in outcome.variants}
    listed = [f"{name} {scale.text(pair[0])} ({outcome.point(pair[1])})" for name, pair in best.items() if pair]
    if not listed:
        return []
    return [
        f"Best {scale.name} so far on {_seeds(outcome.facts.select_seeds)}, {scale.direction}: {'; '.join(listed)}."
    ]


def _order(outcome: Outcome) -> list[str]:
    """Name the best mean, the clearly worse variants, and the variants that cannot be told apart."""
    scale, best, others = outcome.scale(outcome.metric), outcome.ranked[0], outcome.ranked[1:]
    mean = outcome.mean(best, outcome.metric)
    explanation = "mean ± standard error, " if mean.error is not None else ""
    value = f"{scale.mean(mean)} ({explanation}{plural(mean.seeds, 'seed')})"
    if not others:
        missing = "" if len(outcome.variants) == 1 else " No other variant has confirmed results yet."
        result = f"{best} reaches {outcome.metric} {value}, {scale.direction}."
        return [f"{result}{missing} There is no second variant to compare {best} with."]
    sentences = [f"{best} has the best mean of {outcome.metric}: {value}; {scale.direction}."]
    pairs = [outcome.difference(best, other) for other in others]
    unknown = [pair for pair in pairs if pair.student is None]
    worse = [pair for pair in pairs if pair.student and outcome.verdict(pair) > 0]
    equal = [pair for pair in pairs if pair.student and outcome.verdict(pair) == 0]
    if len(worse) == len(others):
        compared = f"each of the other {count_text(len(others))} variants" if len(others) > 1 else others[0]
        sentences.append(f"{best} is clearly better than {compared}: {_listed(outcome, worse)}.")
    elif worse:
        sentences.append(f"{best} is clearly better than {_listed(outcome, worse)}.")
    if equal:
        sentences.append(f"This sweep cannot tell {best} from {_listed(outcome, equal)}.")
    if worse or equal:
        unit = f" in{scale.unit}" if scale.unit else ""
        sentences.append(
            f"Brackets give the mean difference{unit}, {best} minus the other variant, and the difference's 95 % "
            "interval."
        )
    if unknown:
        names = join_words([pair.second for pair in unknown])
        fewest = min(pair.seeds for pair in unknown)
        sentences.append(
            f"No interval is given for {best} against {names}: they share fewer than {count_text(STUDENT_SEEDS)} "
            f"confirmed seeds ({fewest}). The order of their means can be chance. Confirm with more seeds."
        )
    return [" ".join(sentences)]


def _sides(outcome: Outcome) -> list[str]:
    return [variant for variant in outcome.ranked if outcome.kind(variant) == "one side"]


def _enough(outcome: Outcome) -> list[str]:
    """Answer whether one side is enough, as far as the intervals allow."""
    lora, sides = outcome.lora, _sides(outcome)
    if lora is None or not sides:
        return []
    pairs = [outcome.difference(side, lora) for side in sides]
    judged = [pair for pair in pairs if pair.student is not None]
    if not judged:
        return [f"There are too few seeds to decide whether one side is enough: no interval is given against {lora}."]
    better = [pair for pair in judged if outcome.verdict(pair) > 0]
    equal = [pair for pair in judged if outcome.verdict(pair) == 0]
    if better:
        names = join_words([pair.first for pair in better])
        return [f"One side is enough by this sweep: {names} {_is(better)} clearly better than {lora}."]
    if equal:
        safest = min(equal, key=lambda pair: _possible_loss(outcome, pair))
        loss = f"{outcome.scale(outcome.metric).text(_possible_loss(outcome, safest))}"
        return [
            f"One side may be enough: {join_words([pair.first for pair in equal])} cannot be told from {lora}. By the "
            f"interval, {safest.first} may be up to {loss}{outcome.scale(outcome.metric).unit} worse than {lora}."
        ]
    names = join_words([pair.first for pair in judged])
    return [f"One side is not enough by this sweep: {names} {_is(judged)} clearly worse than {lora}."]


def _is(pairs: list[PairedDifference]) -> str:
    return "is" if len(pairs) == 1 else "are"


def _possible_loss(outcome: Outcome, pair: PairedDifference) -> float:
    """Return the largest loss of a pair's first variant that the Student interval allows."""
    assert pair.student is not None
    low, high = pair.student
    return max(0.0, -low if outcome.scale(outcome.metric).higher_is_better else high)


def _head(outcome: Outcome) -> list[str]:
    """Compare the head alone with the best adapter."""
    head = next((variant for variant in outcome.ranked if outcome.kind(variant) == "head"), None)
    adapter = next((v for v in outcome.ranked if outcome.kind(v) not in ("head", "full")), None)
    if head is None or adapter is None:
        return []
    pair, scale = outcome.difference(head, adapter), outcome.scale(outcome.metric)
    if pair.student is None:
        return []
    numbers = f"{adapter}, the best adapter ({_numbers_of(outcome, pair)})"
    subject = "The head alone" + ("" if head == "head" else f" ({head})")
    verdict = outcome.verdict(pair)
    if verdict > 0:
        return [f"{subject} is clearly better than {numbers}: adapters do not help here."]
    if verdict < 0:
        return [f"{subject} is clearly worse than {numbers}: adapters help here."]
    gain = _possible_loss(outcome, pair)
    return [
        f"{subject} cannot be told from {numbers}. This sweep shows no gain from adapters. A gain of up to "
        f"{scale.text(gain)}{scale.unit} is not excluded."
    ]


def _cheapest(outcome: Outcome) -> list[str]:
    """Name the variant with the fewest parameters among those that cannot be told from the best variant."""
    best = outcome.ranked[0]
    parameters = {variant: outcome.cost(variant, "params/trainable") for variant in outcome.ranked}
    pairs = [outcome.difference(other, best) for other in outcome.ranked[1:]]
    cheaper = [
        (count, pair)
        for pair in pairs
        if (count := parameters[pair.first]) is not None
        and (of_best := parameters[best]) is not None
        and count < of_best
        and pair.student
        and outcome.verdict(pair) == 0
    ]
    if not cheaper:
        return []
    count, pair = min(cheaper, key=lambda item: item[0])
    scale, loss = outcome.scale(outcome.metric), _possible_loss(outcome, pair)
    return [
        f"Of the variants that this sweep cannot tell from {best}, {pair.first} trains the fewest parameters "
        f"({count:,.0f}, {_share(count, parameters[best])} of {best}). By the interval, {pair.first} may be up to "
        f"{scale.text(loss)}{scale.unit} worse."
    ]


def _chance(outcome: Outcome) -> list[str]:
    """Return a sentence about the number of compared pairs, and the chance findings to expect."""
    pairs = sum(pair.student is not None for pair in outcome.differences)
    if pairs < 2:
        return []
    return [
        f"{pairs} pairs of variants were compared, and no interval is corrected for their number. If no variants "
        f"differed, about {pairs * 0.05:.2g} of the {pairs} intervals would still exclude zero by chance."
    ]


def _gaps(outcome: Outcome) -> list[str]:
    """Name the variants whose confirmed trials are incomplete."""
    sentences = []
    for variant in outcome.variants if outcome.ranked or outcome.facts.finished else ():
        trials = outcome.at_choice(variant, outcome.phase)
        failed = int((trials["state"] == "failed").sum())
        if variant not in outcome.ranked and not outcome.complete.empty:
            rows = outcome.trials[outcome.trials["variant"] == variant]
            lost = int((rows["state"] == "failed").sum())
            reason = f": {lost} of its {counted(len(rows), 'trial')} failed" if lost else ""
            sentences.append(f"{variant} is missing from the comparison, since it has no confirmed result{reason}.")
        elif failed:
            sentences.append(
                f"{failed} of {counted(len(trials), 'confirming trial')} of {variant} failed and "
                f"{'is' if failed == 1 else 'are'} left out of its means."
            )
    return sentences


def _compared(outcome: Outcome, first: str, second: str) -> str:
    """Compare two variants in quality and in cost."""
    pair, scale = outcome.difference(first, second), outcome.scale(outcome.metric)
    costs = _costs(outcome, first, second)
    numbers = _numbers_of(outcome, pair)
    if pair.student is None:
        return f"{first} against {second}: {numbers}.{costs}"
    verdict = outcome.verdict(pair)
    if verdict:
        return f"{first} is clearly {'better' if verdict > 0 else 'worse'} than {second} ({numbers}).{costs}"
    reach = scale.text(max(abs(bound) for bound in pair.student))
    return f"{first} is within {reach}{scale.unit} of {second} ({numbers}): this sweep cannot tell them apart.{costs}"


def _costs(outcome: Outcome, first: str, second: str) -> str:
    """Return a sentence about the costs of a variant in per cent of another variant's; empty if none is known."""
    shares = []
    for metric, name in COSTS.items():
        cost, other = outcome.cost(first, metric), outcome.cost(second, metric)
        if cost and other:
            shares.append(f"{name} {_share(cost, other)}")
    return f" Costs of {first} in per cent of {second}'s: {', '.join(shares)}." if shares else ""


def _numbers_of(outcome: Outcome, pair: PairedDifference) -> str:
    """Return a paired difference with its interval and its number of seeds."""
    scale = outcome.scale(outcome.metric)
    if not pair.seeds:
        return "no shared confirmed seed"
    difference = f"difference {scale.signed(pair.mean)}{scale.unit}"
    if pair.student is None:
        return f"{difference}, {plural(pair.seeds, 'seed')}, no interval"
    return f"{difference}, 95 % interval {_interval(outcome, pair)}, {plural(pair.seeds, 'seed')}"


def _listed(outcome: Outcome, pairs: list[PairedDifference]) -> str:
    """Return the second variants of pairs, each with difference and interval."""
    scale = outcome.scale(outcome.metric)
    return join_words([f"{pair.second} ({scale.signed(pair.mean)}; {_interval(outcome, pair)})" for pair in pairs])


def _interval(outcome: Outcome, pair: PairedDifference) -> str:
    """Return the Student interval of a pair as text."""
    assert pair.student is not None
    scale = outcome.scale(outcome.metric)
    return f"{scale.signed(pair.student[0])} to {scale.signed(pair.student[1])}"


def _share(value: float, whole: float | None) -> str:
    """Return a value as a percentage of another value."""
    share = 100 * value / whole if whole else float("nan")
    return f"{share:.0f} %" if share >= 1 else f"{share:.2g} %"


def _seeds(seeds: Sequence[int]) -> str:
    """Return seeds as a phrase."""
    return f"seed {_numbers(seeds)}" if len(seeds) == 1 else f"seeds {_numbers(seeds)}"


def _numbers(seeds: Sequence[int]) -> str:
    """Return seeds as text."""
    return join_words([str(seed) for seed in seeds])
