"""What a report reads of a run, finished or not."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastalign.backbones.vit import ViT
from fastalign.backbones.weight_files import read_facts
from fastalign.backbones.zoo import load_backbone
from fastalign.config import Config, load_config
from fastalign.report.probe import ALIGNED, BEFORE, Probe, read_probe
from fastalign.training.build import starting_backbone
from fastalign.training.metrics import read_metrics
from fastalign.utils.errors import UserError


@dataclass
class Run:
    """The files of a run folder."""

    folder: Path
    metrics: list[dict]
    config: Config | None = None
    facts: dict[str, Any] | None = None
    """backbone.json; None if no backbone has been saved yet"""
    probe: Probe | None = None
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
