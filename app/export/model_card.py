"""Model card of an export: README.md as the hub reads it. Quotes from data and checkpoints stay plain text."""

from __future__ import annotations

import logging
import re
import string
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from app.console import quantity_text
from app.export.loader_code import LOCAL, is_timm, short_name
from app.run.checkpoint_io import read_checkpoint, run_of_checkpoint, saved_configuration
from app.run.evaluations import Evaluation, evaluations_of_checkpoint, metrics_of_split, read_metrics
from modules.base import AdaptedModule
from modules.training.checkpoints import CHAIN

TASKS = {  # the hub's pipeline by kind of data; other kinds have no pipeline and no scores in the front matter
    "images": "image-classification",
    "labelled texts": "text-classification",
    "summaries": "summarization",
    "instructions": "text-generation",
}
SPLITS = {"val": "validation", "test": "test"}
COSTS = ("params", "adapter", "time", "memory")  # groups of metrics.json that do not depend on data or checkpoint
_log = logging.getLogger(__name__)
MOST_LABELS = 30  # largest number of classes that a card lists
_PLAIN = re.compile(r"[A-Za-z0-9_.,:/+% -]{1,200}")
_MARKUP = {ord(mark): f"&#{ord(mark)};" for mark in string.punctuation}


def write_card(
    folder: Path,
    module: AdaptedModule,
    checkpoint: Path,
    form: str,
    load: str,
    notes: Mapping[str, Any],
) -> None:
    """Write README.md.

    Args:
        folder: Directory of the export.
        module: The model, with or without its adapters.
        checkpoint: The exported checkpoint. The card quotes the checkpoint's evaluations with the data settings of the
            training, and the costs of the fit.
        form: The format of the export.
        load: Code or command that loads the export.
        notes: Further rows of the card's table.
    """
    content = read_checkpoint(checkpoint)
    saved = saved_configuration(content)
    run = run_of_checkpoint(checkpoint)
    model = saved["model"]["init_args"]
    data = saved.get("data", {}).get("init_args", {})
    metrics = _published_metrics(evaluations_of_checkpoint(content, run))
    limits = [f"data.{key} {n}" for split in SPLITS for key, n in _limits(data, split).items()]
    library = "timm" if is_timm(module) else "transformers"
    dataset = str(data.get("task") or short_name(str(data.get("path") or "unknown")))
    facts = {
        "Base model": short_name(model["backbone"]),
        "Its weights": short_name(model.get("weights", "pretrained")),
        "Data": dataset,
        "Tuning": module.tuning,
        **(_variant(module) if module.tuning == "adapter" else {}),
        **_chain(content.get(CHAIN, {}).get("links", []), model),
        **notes,
        **({"Classes": _labels(model["class_names"])} if model.get("class_names") else {}),
        "License": "as the base model",
    }
    versions = {name: version(name) for name in ("torch", "lightning", library)}
    body = [
        f"# {_quoted(short_name(model['backbone']))}, tuned on {_quoted(dataset)}",
        "Tuned with Onesided, after [Asymmetry in Low-Rank Adapters](https://arxiv.org/abs/2402.16842).",
        _table(("", ""), facts),
        "## Load it",
        _block("python" if load.startswith("import ") else "bash", load),
        "## Metrics",
        _table(("Metric", "Value"), _readable(metrics))
        if metrics
        else "The run has no evaluation of this checkpoint with the data settings of the training.",
        *([f"Limits of the evaluated rows: {', '.join(map(_quoted, limits))}."] if limits and metrics else []),
        "## Training",
        _table(("Figure", "Value"), _readable(costs)) if (costs := _read_costs(run)) else "The run recorded no costs.",
        "## Configuration",
        _block("yaml", yaml.safe_dump(_plain(dict(saved)), sort_keys=False)),
        "## Versions",
        _table(("Package", "Version"), versions),
    ]
    front = _front_matter(module, model, data, form, library, dataset, metrics)
    text = f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n" + "\n\n".join(body) + "\n"
    (folder / "README.md").write_text(text, encoding="utf-8")


def write_combination_card(
    folder: Path, module: AdaptedModule | None, facts: Mapping[str, str], sources: Sequence[Sequence[str]], load: str
) -> None:
    """Write README.md of a combined adapter.

    Args:
        folder: Directory of the adapter.
        module: The model with the combined adapters; None if the model is unknown.
        facts: Rows of the card's table.
        sources: Name, weight, digest of A and digest of B of each combined adapter.
        load: Code or command that loads the adapter.
    """
    from huggingface_hub import ModelCardData

    known: dict[str, Any] = {}
    base = None
    if module is not None:
        library = "timm" if is_timm(module) else "transformers"
        base = _hub_name(module.hparams, library)
        known = {"Base model": short_name(module.hparams["backbone"])}
    rows = ["| Adapter | Weight | Digest of A | Digest of B |", "|---|---|---|---|"]
    rows += [f"| {' | '.join(map(_quoted, source))} |" for source in sources]
    body = [
        f"# {len(sources)} combined adapters",
        "Combined with Onesided, after [Asymmetry in Low-Rank Adapters](https://arxiv.org/abs/2402.16842).",
        _table(("", ""), {**known, **facts, "License": "as the base model"}),
        "## Sources",
        "\n".join(rows),
        "A digest is the start of a sha256 of one factor of all projections. Adapters over one frozen factor have one "
        "digest in common.",
        "## Load it",
        _block("python" if load.startswith("import ") else "bash", load),
    ]
    card = ModelCardData(
        base_model=base, base_model_relation="adapter" if base else None, library_name="peft", tags=["onesided"]
    )
    front = yaml.safe_dump(card.to_dict(), sort_keys=False)  # type: ignore[no-untyped-call]
    (folder / "README.md").write_text(f"---\n{front}---\n\n" + "\n\n".join(body) + "\n", encoding="utf-8")


def _front_matter(
    module: AdaptedModule,
    model: Mapping[str, Any],
    data: Mapping[str, Any],
    form: str,
    library: str,
    dataset: str,
    metrics: Mapping[str, float],
) -> dict[str, Any]:
    """Return the front matter for the hub, without a license, since the base model's license applies."""
    from huggingface_hub import EvalResult, ModelCardData

    task = TASKS.get(module.kinds[0])
    results = [
        EvalResult(
            task_type=task,
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=SPLITS[split],
            dataset_args=_limits(data, split) or None,
            metric_type=name,
            metric_value=value,
        )
        for key, value in metrics.items()
        for split, _, name in [key.partition("/")]
        if task is not None and split in SPLITS
    ]
    base = _hub_name(model, library)
    relation = "finetune" if form == "merged" else "adapter"
    card = ModelCardData(
        base_model=base,
        base_model_relation=relation if base else None,
        library_name={"merged": library, "peft": "peft"}.get(form),
        pipeline_tag=task,
        tags=["onesided"],
        model_name="onesided" if results else None,
        eval_results=results or None,
    )
    front: dict[str, Any] = card.to_dict()  # type: ignore[no-untyped-call]
    return front


def _variant(module: AdaptedModule) -> dict[str, Any]:
    config = module.adapter
    scale = "by name" if config.rank_pattern or config.alpha_pattern else f"{config.scale:g}"
    return {
        "Trained side": config.train,
        "A, B at the start": f"{config.init_a}, {config.init_b}",
        "Rank": _with_patterns(config.rank, config.rank_pattern),
        "Alpha, scale": f"{_with_patterns(config.alpha, config.alpha_pattern)}, {scale}",
        "Targets": config.targets if isinstance(config.targets, str) else ", ".join(config.targets),
        "Layers": "all" if config.layers is None else f"the last {config.layers}",
    }


def _chain(links: Sequence[Any], model: Mapping[str, Any]) -> dict[str, str]:
    """Return the row of a chain, with the rank and the initialisers of its links; empty without merged links."""
    if not links:
        return {}
    adapter = model["adapter"]
    starts = f"A {adapter['init_a']}, B {adapter['init_b']}"
    return {"Chain": f"{len(links) + 1} links of rank {adapter['rank']}, {starts} at the start of each"}


def _with_patterns(value: float, patterns: Mapping[str, float]) -> str:
    """Return a rank or an alpha as text, with the range of the values that are set by name."""
    others = f" ({min(patterns.values()):g} to {max(patterns.values()):g} by name)" if patterns else ""
    return f"{value:g}{others}"


def _published_metrics(evaluations: list[Evaluation]) -> dict[str, float]:
    """Return the newest metrics of each split, from evaluations with the checkpoint's own data and settings."""
    published = {evaluation.split: evaluation.metrics for evaluation in evaluations if not evaluation.differences}
    for evaluation in evaluations:
        if evaluation.differences:
            _log.info(
                f"The card leaves out {evaluation.split} metrics of an evaluation, since these keys differ from the "
                f"checkpoint's: {', '.join(evaluation.differences)}."
            )
    return {key: value for split in SPLITS for key, value in published.get(split, {}).items()}


def _limits(data: Mapping[str, Any], split: str) -> dict[str, Any]:
    """Return the key of `data` that limits the rows of a split, with its value; empty without a limit."""
    key = f"max_{split}_samples"
    return {key: data[key]} if data.get(key) else {}


def _read_costs(run: Path | None) -> dict[str, float]:
    """Return the costs in a run's metrics.json: parameter counts, bytes and seconds."""
    metrics = read_metrics(run) if run is not None else {}
    return {name: value for group in COSTS for name, value in metrics_of_split(metrics, group).items()}


def _hub_name(model: Mapping[str, Any], library: str) -> str | None:
    """Return the base model's name on the hub; None for a local model or random weights."""
    name = str(model["backbone"])
    if model.get("weights", "pretrained") != "pretrained" or Path(name).exists() or name.startswith(LOCAL):
        return None
    if ":" in name:  # timm's hf_hub:NAME@REVISION
        name = name.partition(":")[2].partition("@")[0]
    elif library == "timm":
        name = f"timm/{name}"
    else:
        name = "/".join(name.split("/")[:2])
    return name if re.fullmatch(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)?", name) else None


def _plain(value: Any) -> Any:
    """Convert a configuration to values that YAML can express, with local paths cut to their last part."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, bool | int | float) else short_name(str(value))


def _labels(names: list[str]) -> str:
    total = f", … ({len(names)} in all)" if len(names) > MOST_LABELS else ""
    return ", ".join(str(name) for name in names[:MOST_LABELS]) + total


# --------------------------------------------------------------------------------------------------------- as Markdown


def _quoted(value: Any) -> str:
    """Escape a value for Markdown: as code if all characters are plain, else with entities for all punctuation."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
    return f"`{text}`" if _PLAIN.fullmatch(text) else text.translate(_MARKUP)


def _table(head: tuple[str, str], rows: Mapping[str, Any]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {_name(key)} | {_quoted(value)} |" for key, value in rows.items())])


def _readable(figures: Mapping[str, float]) -> dict[str, str]:
    """Return figures with units, separators of thousands and six significant digits."""
    return {key: quantity_text(key, value) or f"{value:.6g}" for key, value in figures.items()}


def _name(key: str) -> str:
    """Return the name of a row. Names from data, such as a subject's, are escaped unless all characters are plain."""
    return key if re.fullmatch(r"[\w/.,@ -]*", key) else _quoted(key)


def _block(language: str, text: str) -> str:
    """Return a code block whose fence is longer than any run of backticks in the text."""
    fence = "`" * max(3, 1 + max((len(ticks) for ticks in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
