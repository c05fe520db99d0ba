"""What a report reads: the files of a run, finished or not, and the results of `fastalign probe`."""

import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastalign.backbones.vit import ViT
from fastalign.backbones.weight_files import read_facts, read_json
from fastalign.backbones.zoo import load_backbone
from fastalign.config import Config, load_config
from fastalign.training.build import starting_backbone
from fastalign.training.metrics import read_metrics
from fastalign.utils.errors import UserError

BEFORE, ALIGNED = "before", "aligned"
METRICS = {"macro_recall": "Macro recall", "map": "mAP", "macro_f1": "Macro F1", "accuracy": "Accuracy"}


@dataclass(frozen=True)
class Probe:
    """`probe.json`, and its test splits by setting (labels, head, skipped blocks) and model."""

    facts: dict
    summary: dict[str, dict[str, dict]]
    """over seeds: metric -> "mean", "std" """
    seeds: dict[str, dict[str, list[dict]]]

    def settings(self) -> list[str]:
        """Every setting: those with both `before` and `aligned` first, then patch labels, then transformer heads."""

        def rank(setting: str) -> tuple[bool, bool, bool]:
            both = {BEFORE, ALIGNED} <= self.summary[setting].keys()
            return (not both, setting.startswith("global"), "transformer head" not in setting)

        return sorted(self.summary, key=rank)

    def models(self, setting: str) -> list[str]:
        """At most two models to compare in a setting: before and aligned come first."""
        return sorted(self.summary[setting], key=lambda name: {BEFORE: 0, ALIGNED: 1}.get(name, 2))[:2]

    def score(self, setting: str, model: str, metric: str) -> dict | None:
        """Mean and spread over seeds; None if it was not measured."""
        return self.summary[setting][model].get(metric)

    def average(self, setting: str, part: str, key: str) -> dict[str, np.ndarray]:
        """Of each model that has it a list of `per_class` or `by_size`: mean over seeds, NaN where it is unknown."""
        found = {}
        for model in self.models(setting):
            tests = self.seeds[setting][model]
            if lists := [values for test in tests if (values := test.get(part, {}).get(key))]:
                found[model] = np.ma.masked_invalid(np.array(lists, float)).mean(0).filled(np.nan)
        return found


def read_probe(path: Path) -> Probe:
    """Read `probe.json`.

    Raises:
        UserError: it is missing, or not in the format of `fastalign probe`.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; write it with fastalign probe --backbone RUN --data DATA")
    summary, seeds = defaultdict(dict), defaultdict(lambda: defaultdict(list))
    try:
        facts = json.loads(path.read_bytes())
        facts["data"]["classes"], facts["data"]["images"].items(), facts["summary"][0]["seeds"]
        for row in facts["summary"]:
            summary[_setting(row)][row["model"]] = row["test"]
        for row in facts["results"]:
            seeds[_setting(row)][row["model"]].append(row["test"])
        return Probe(facts, summary, seeds)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(
            f"{path} has no results of fastalign probe ({type(error).__name__}: {error}): run it again, "
            "or remove the file"
        ) from None


def _setting(row: dict) -> str:
    """What two models must share to be compared, in words."""
    skipped = row.get("skip_blocks", 0)
    return f"{row['labels']} labels, {row['head']} head" + (f", {skipped} blocks skipped" if skipped else "")


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
    places = {BEFORE: folder / "before/classify.json", ALIGNED: folder / "classify.json"}
    run.classified = {model: _read_classified(path) for model, path in places.items() if path.is_file()}
    return run


def _read_classified(path: Path) -> dict:
    facts = read_json(path)
    try:
        facts["settings"]["head"], float(facts["mean"]["top1"])
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{path} has no results of fastalign classify ({reason}): run it again, or remove the file"
        ) from None
    return facts


def load_backbones(run: Run) -> dict[str, ViT]:
    """The aligned backbone and, first, the one before alignment (without the run's soft-cap), if it is available."""
    found = {ALIGNED: load_backbone(run.folder)}
    if run.config is not None:
        try:
            before = starting_backbone(run.config).eval()
        except UserError as error:
            run.notes.append(f"Features before are not shown, their weights are not available: {error}")
            return found
        if before.spec.grid == found[ALIGNED].spec.grid:
            return {BEFORE: before, **found}
        run.notes.append("Features before are not shown: that backbone has another grid of patches.")
    return found
