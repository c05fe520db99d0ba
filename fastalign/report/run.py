"""The input of a report: the files of a run, finished or not, and the results of `fastalign probe`."""

import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastalign.backbones.vit import ViT
from fastalign.backbones.weight_files import read_facts
from fastalign.backbones.zoo import load_backbone
from fastalign.config import Config, load_config
from fastalign.training.build import starting_backbone
from fastalign.training.metrics import read_metrics
from fastalign.utils.errors import UserError

BEFORE, ALIGNED = "before", "aligned"
METRICS = {"macro_recall": "Macro recall", "map": "mAP", "macro_f1": "Macro F1", "accuracy": "Accuracy"}


@dataclass(frozen=True)
class Setting:
    """Test results of a probe, by model, for one combination of labels, head and skipped blocks."""

    scores: dict[str, dict[str, dict]] = field(default_factory=dict)  # metric -> "mean", "std" over seeds
    seeds: dict[str, list[dict]] = field(default_factory=lambda: defaultdict(list))

    def average(self, part: str, key: str) -> dict[str, np.ndarray]:
        """For each model that has it, a list of `per_class` or `by_size` as the mean over seeds; NaN = unknown."""
        found = {}
        for model in self.scores:
            if lists := [values for test in self.seeds[model] if (values := test.get(part, {}).get(key))]:
                found[model] = np.ma.masked_invalid(np.array(lists, float)).mean(0).filled(np.nan)
        return found


def read_probe(path: Path) -> tuple[dict, dict[str, Setting]]:
    """The content of `probe.json`, and its settings by name; patch labels and transformer heads come first."""
    settings = defaultdict(Setting)
    with _results_of("probe", path):
        facts = json.loads(path.read_bytes())
        facts["data"]["classes"], facts["data"]["images"].items(), facts["summary"][0]["seeds"]
        facts["command"], facts["versions"].items()
        both = {BEFORE, ALIGNED} & {row["model"] for row in facts["summary"]}
        for row in facts["summary"]:
            if row["model"] in both or not both:  # the demo's controls are left out
                settings[_setting(row)].scores[row["model"]] = row["test"]
        for row in facts["results"]:
            settings[_setting(row)].seeds[row["model"]].append(row["test"])
    order = sorted(settings, key=lambda name: (name.startswith("global"), "transformer head" not in name))
    return facts, {name: settings[name] for name in order if settings[name].scores}


def _setting(row: dict) -> str:
    skipped = row.get("skip_blocks", 0)
    return f"{row['labels']} labels, {row['head']} head" + (f", {skipped} blocks skipped" if skipped else "")


@contextmanager
def _results_of(command: str, path: Path) -> Iterator[None]:
    """Raise a UserError if a file that is read does not have a command's results."""
    try:
        yield
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        text = f"{path} has no results of fastalign {command} ({type(error).__name__}: {error})"
        raise UserError(f"{text}: run it again, or remove the file") from None


@dataclass
class Run:
    """The files of a run folder."""

    folder: Path
    metrics: list[dict]
    config: Config | None = None
    facts: dict[str, Any] | None = None  # backbone.json; None if no backbone has been saved yet
    probe: dict | None = None  # probe.json
    settings: dict[str, Setting] = field(default_factory=dict)
    top1: dict[str, float] = field(default_factory=dict)  # of `fastalign classify`, by model
    head: str = ""  # of the same
    notes: list[str] = field(default_factory=list)  # what is missing, and why


def read_run(folder: Path, probe: Path | None = None) -> Run:
    """Read a run folder; `probe` defaults to its `probe.json`, if it exists. UserError: no run, a damaged file."""
    metrics, config, backbone = (folder / n for n in ("metrics.jsonl", "config.yaml", "backbone.json"))
    if not (metrics.is_file() or backbone.is_file()):
        raise UserError(f"RUN {folder} has neither metrics.jsonl nor backbone.json: give a run's folder")
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
        reason = "it is unfinished, or trains the decoder only"
        run.notes.append(f"This run has saved no backbone ({reason}): there are no patch features.")
    if probe is not None or (folder / "probe.json").is_file():
        run.probe, run.settings = read_probe(probe or folder / "probe.json")
    for model, path in ((BEFORE, folder / "before/classify.json"), (ALIGNED, folder / "classify.json")):
        if path.is_file():
            with _results_of("classify", path):
                facts = json.loads(path.read_bytes())
                run.top1[model] = float(facts["mean"]["top1"])
                run.head = facts["settings"]["head"]
    return run


def load_backbones(run: Run) -> dict[str, ViT]:
    """The aligned backbone and, first, the one before alignment (without the run's soft-cap), if it is available."""
    before = {}
    if run.config is not None:
        try:
            before[BEFORE] = starting_backbone(run.config).eval()
        except UserError as error:
            run.notes.append(f"Features before alignment are not shown: {error}")
    return {**before, ALIGNED: load_backbone(run.folder)}
