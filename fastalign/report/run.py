"""What a report reads: the files of a run, finished or not, and the results of `fastalign probe`."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from fastalign.backbones.vit import ViT
from fastalign.backbones.weight_files import read_facts, read_json
from fastalign.backbones.zoo import load_backbone
from fastalign.config import Config, load_config
from fastalign.evaluation.results import percent
from fastalign.training.build import starting_backbone
from fastalign.training.metrics import read_metrics
from fastalign.utils.errors import UserError

BEFORE, ALIGNED = "before", "aligned"
METRICS = {"macro_recall": "Macro recall", "map": "mAP", "macro_f1": "Macro F1", "accuracy": "Accuracy"}
Setting = tuple[str, str, str]
"""Labels, head, skipped blocks: what two models must share to be compared."""


@dataclass(frozen=True)
class Probe:
    """`probe.json`."""

    facts: dict
    results: list[tuple[str, Setting, dict]]
    """model, setting and test split of each head and seed"""
    summary: list[tuple[str, Setting, dict]]
    """the same over seeds: metric -> "mean", "std" """

    def settings(self) -> list[Setting]:
        """Every setting: those with both `before` and `aligned` first, then patch labels, then transformer heads."""
        models: dict[Setting, set[str]] = {}
        for model, setting, _ in self.summary:
            models.setdefault(setting, set()).add(model)

        def rank(setting: Setting) -> tuple[bool, bool, bool]:
            both = {BEFORE, ALIGNED} <= models[setting]
            return (not both, setting[0].startswith("global"), setting[1] != "transformer")

        return sorted(models, key=rank)

    def models(self, setting: Setting) -> list[str]:
        """At most two models to compare in a setting: before and aligned come first."""
        found = dict.fromkeys(model for model, other, _ in self.results if other == setting)
        return sorted(found, key=lambda name: {BEFORE: 0, ALIGNED: 1}.get(name, 2))[:2]

    def score(self, model: str, setting: Setting, metric: str) -> dict | None:
        """Mean and spread over seeds on the test split; None if it was not measured."""
        found = [test.get(metric) for *key, test in self.summary if key == [model, setting]]
        return found[0] if found else None

    def average(self, model: str, setting: Setting, part: str, key: str) -> list[float | None]:
        """A list of `per_class` or `by_size`, mean over seeds; empty if it was not measured."""
        tests = [test for *key, test in self.results if key == [model, setting]]
        lists = [values for test in tests if (values := test.get(part, {}).get(key))]
        columns = [[value for value in column if value is not None] for column in zip(*lists, strict=True)]
        return [fmean(column) if column else None for column in columns]

    def by_size(self, setting: Setting) -> tuple[list[float], dict[str, list[float | None]]]:
        """The upper edges of the bins, and each model's recall by size, if it was measured."""
        recall = {model: self.average(model, setting, "by_size", "recall") for model in self.models(setting)}
        recall = {model: values for model, values in recall.items() if values}
        return self.average(next(iter(recall), ""), setting, "by_size", "edges")[1:], recall


def read_probe(path: Path) -> Probe:
    """Read `probe.json`.

    Raises:
        UserError: it is missing, or not in the format of `fastalign probe`.
    """

    def rows(key: str) -> list[tuple[str, Setting, dict]]:
        return [
            (row["model"], (row["labels"], row["head"], str(row.get("skip_blocks", 0))), row["test"])
            for row in facts[key]
        ]

    if not path.is_file():
        raise UserError(f"{path}: no such file; write it with fastalign probe --backbone RUN --data DATA")
    try:
        facts = json.loads(path.read_bytes())
        facts["data"]["classes"], facts["summary"][0]["seeds"]
        return Probe(facts, rows("results"), rows("summary"))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"{path} has no results of fastalign probe ({type(error).__name__}: {error}): run it again, "
            "or remove the file"
        ) from None


def score_text(score: dict | None) -> str:
    """In percent, with the standard deviation if there are several seeds: 71.3 ± 0.4"""
    return "–" if score is None or score["mean"] is None else percent(score)


def setting_text(setting: Setting) -> str:
    """A setting in words."""
    labels, head, skipped = setting
    return f"{labels} labels, {head} head" + (f", {skipped} blocks skipped" if skipped != "0" else "")


@dataclass
class Run:
    """The files of a run folder."""

    folder: Path
    metrics: list[dict]
    config: Config | None = None
    facts: dict[str, Any] | None = None
    """backbone.json; None if no backbone has been saved yet"""
    probe: Probe | None = None
    classified: dict[str, dict] = field(default_factory=dict)
    """classify.json, by model"""
    notes: list[str] = field(default_factory=list)
    """what is missing, and why"""


def read_run(folder: Path, probe: Path | None = None) -> Run:
    """Read a run folder; without `probe` its own `probe.json`, if it exists.

    Raises:
        UserError: not a run folder, or a damaged file.
    """
    metrics, config, backbone = (folder / n for n in ("metrics.jsonl", "config.yaml", "backbone.json"))
    if not (metrics.is_file() or backbone.is_file()):
        raise UserError(
            f"RUN {folder}: it has neither metrics.jsonl nor backbone.json; give the folder of a run that has started"
        )
    run = Run(folder, read_metrics(metrics) if metrics.is_file() else [])
    if not run.metrics:
        run.notes.append("metrics.jsonl is missing or empty: there are no curves.")
    if config.is_file():
        run.config = load_config(config)
    else:
        run.notes.append("config.yaml is missing: the backbone before alignment is unknown.")
    if backbone.is_file():
        run.facts = read_facts(backbone)
    else:
        frozen = run.config is not None and run.config.student.freeze
        reason = "it trains the decoder only" if frozen else "it is unfinished"
        run.notes.append(f"This run has saved no backbone ({reason}): there are no patch features.")
    if probe is not None or (folder / "probe.json").is_file():
        run.probe = read_probe(probe or folder / "probe.json")
    for model, place in ((BEFORE, folder / "before"), (ALIGNED, folder)):
        if (place / "classify.json").is_file():
            run.classified[model] = read_json(place / "classify.json")
    return run


def load_backbones(run: Run) -> dict[str, ViT]:
    """The aligned backbone and, first, the one before alignment (without the run's soft-cap), if it is available."""
    found = {}
    if run.config is not None:
        try:
            found[BEFORE] = starting_backbone(run.config).eval()
        except UserError as error:
            run.notes.append(f"Features before are not shown, their weights are not available: {error}")
    found[ALIGNED] = load_backbone(run.folder)
    if BEFORE in found and found[BEFORE].spec.grid != found[ALIGNED].spec.grid:
        del found[BEFORE]
        run.notes.append("Features before are not shown: that backbone has another grid of patches.")
    return found
