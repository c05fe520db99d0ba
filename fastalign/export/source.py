"""What an export is made from: the folder of a run."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from fastalign.backbones.vit import ViT
from fastalign.backbones.zoo import MOCO, load_backbone
from fastalign.config import Config, load_config
from fastalign.export import decoder
from fastalign.utils.errors import UserError, first_line

MOCO_LICENCE = "cc-by-nc-4.0"


@dataclass
class Run:
    """A finished run: its backbone and what is known about it."""

    folder: Path
    vit: ViT
    facts: dict[str, Any]
    """backbone.json"""
    config: Config | None = None
    """None where config.yaml is missing"""
    decoder: dict[str, Any] | None = None
    """what `AlignedDecoder` is made from; None = no decoder, and `notes` says why"""
    decoder_weights: dict[str, Tensor] = field(default_factory=dict)
    probe: Any = None
    """probe.json, where the run was probed"""
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """timm's name of the backbone, as it was given."""
        return self.facts["name"]

    @property
    def timm_name(self) -> str:
        """The architecture by a name that timm itself knows."""
        architecture = self.name.split(".")[0]
        return "vit_base_patch16_224" if architecture == MOCO else architecture

    def source(self) -> dict[str, Any]:
        """The backbone that was aligned and its licence, as timm records it; None = unknown."""
        weights = self.config.student.weights if self.config else None
        licence = None
        if weights == "pretrained":
            known = timm.models.get_pretrained_cfg(self.name, allow_unregistered=True)
            licence = MOCO_LICENCE if self.name.startswith(MOCO) else getattr(known, "license", None)
        return {"name": self.name, "weights": weights, "licence": licence}


def read_run(folder: str | Path) -> Run:
    """Read a run.

    Raises:
        UserError: no run, an unknown architecture, weights of another model, or damaged files.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"RUN {folder}: there is no such folder; give the folder of a finished run")
    vit = load_backbone(folder)
    bad = [name for name, value in vit.state_dict().items() if not torch.isfinite(value).all()]
    if bad:
        raise UserError(f"{folder / 'backbone.safetensors'}: {bad[0]} is not finite; export an earlier run")
    run = Run(folder, vit, json.loads((folder / "backbone.json").read_text()))
    if (folder / "config.yaml").is_file():
        run.config = load_config(folder / "config.yaml")
    else:
        run.notes.append("config.yaml is missing: no recipe and no decoder")
    if (folder / "probe.json").is_file():
        run.probe = _probe(folder / "probe.json")
    if run.config is not None:
        _read_decoder(run)
    return run


def _probe(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): remove it, or probe again") from error


def _read_decoder(run: Run) -> None:
    """The decoder of the checkpoint that the backbone was saved with."""
    if run.config.objective != "maskembed":
        run.notes.append("masked image modeling has no decoder")
        return
    state = _checkpoint(run)
    if state is None:
        run.notes.append(f"no checkpoint of step {run.facts.get('step')} is left: no decoder")
        return
    student = state.get("average") or state["student"]
    path = state["path"]
    for name, value in run.vit.state_dict().items():
        other = student.get(f"encoder.{name}")
        if other is None or other.shape != value.shape or not torch.equal(other.float(), value):
            raise UserError(
                f"{path} is a checkpoint of another model or size than {run.folder / 'backbone.safetensors'} ({name} "
                "differs): remove it to export without its decoder"
            )
    try:
        run.decoder, run.decoder_weights = decoder.describe(run.vit, run.config, student)
        decoder.AlignedDecoder(run.decoder).load_state_dict(run.decoder_weights)
    except (RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(
            f"{path} does not fit {run.folder / 'config.yaml'} ({reason}): take the run's own"
        ) from error


def _checkpoint(run: Run) -> dict[str, Any] | None:
    """The checkpoint of the backbone's step; None where it is gone."""
    checkpoints, step = run.folder / "checkpoints", run.facts.get("step", 0)
    for path in (checkpoints / f"step-{step:08d}.pt", checkpoints / "best.pt"):
        if not path.is_file():
            continue
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            found, _ = state["step"], state["student"]
        except Exception as error:
            raise UserError(
                f"{path} is damaged ({first_line(error)[:200]}): remove it to export without its decoder"
            ) from error
        if found == step:
            return {**state, "path": path}
    return None
