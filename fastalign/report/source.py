"""What a report is made from: the folder of a run, finished or not."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastalign.backbones.vit import ViT
from fastalign.backbones.zoo import load_backbone
from fastalign.config import Config, load_config
from fastalign.report.probe import ALIGNED, BEFORE, Probe, read_probe
from fastalign.training.build import starting_backbone
from fastalign.training.metrics import read_metrics
from fastalign.utils.errors import UserError


@dataclass
class Run:
    """A run, as far as it has come."""

    folder: Path
    lines: list[dict]
    """metrics.jsonl"""
    config: Config | None = None
    """None where config.yaml is missing"""
    facts: dict[str, Any] | None = None
    """backbone.json; None where no backbone has been saved yet"""
    probe: Probe | None = None
    """None where the run has not been probed"""
    notes: list[str] = field(default_factory=list)
    """what is missing, and why"""

    @property
    def last_step(self) -> int | None:
        """The newest step of the metrics."""
        return max((line["step"] for line in self.lines), default=None)


def read_run(folder: Path, probe: Path | None = None) -> Run:
    """Read a run.

    Args:
        folder: the run folder.
        probe: a `probe.json`; None = the run's own, where it has one.

    Raises:
        UserError: no run there, or a damaged file.
    """
    if not folder.is_dir():
        raise UserError(f"RUN {folder}: there is no such folder; give the folder of a run")
    names = ("metrics.jsonl", "config.yaml", "backbone.json")
    metrics, config, backbone = (folder / name for name in names)
    if not (metrics.is_file() or backbone.is_file()):
        raise UserError(
            f"RUN {folder}: it has neither {names[0]} nor {names[2]}; give the folder of a run that has started"
        )
    run = Run(folder, read_metrics(metrics) if metrics.is_file() else [])
    if not run.lines:
        run.notes.append("metrics.jsonl is missing or empty: there are no curves.")
    if config.is_file():
        run.config = load_config(config)
    else:
        run.notes.append("config.yaml is missing: what the run started from is not known.")
    if backbone.is_file():
        run.facts = _facts(backbone)
    else:
        frozen = run.config is not None and run.config.student.freeze
        reason = "it trains the decoder only" if frozen else "it is unfinished"
        run.notes.append(f"This run has saved no backbone ({reason}): there are no patch features.")
    if probe is not None or (folder / "probe.json").is_file():
        run.probe = read_probe(probe or folder / "probe.json")
    return run


def _facts(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_bytes())
        facts["name"].partition(".")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}): take the run's own") from error
    return facts


def backbones(run: Run) -> dict[str, ViT]:
    """The backbones of a finished run: what it started from, where that can be had, and what it became.

    The first is as it was given, without the run's soft-cap; random weights are drawn as training draws them.
    """
    found = {}
    if run.config is not None:
        try:
            found[BEFORE] = starting_backbone(run.config).eval()
        except UserError as error:
            run.notes.append(f"Features before are not shown, their weights could not be had: {error}")
    found[ALIGNED] = load_backbone(run.folder)
    if BEFORE in found and found[BEFORE].spec.grid != found[ALIGNED].spec.grid:
        del found[BEFORE]
        run.notes.append("Features before are not shown: that backbone has another grid of patches.")
    return found
