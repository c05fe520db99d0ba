"""A run: what it consists of, how it is saved and how it continues."""

import json
import math
from contextlib import nullcontext
from pathlib import Path

import safetensors.torch
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastalign import __version__, build
from fastalign.config import Config
from fastalign.engine.checkpoint import Checkpoints, write_atomically
from fastalign.engine.distributed import World
from fastalign.engine.optim import MovingAverage, class_name, make_optimizer
from fastalign.engine.status import Status
from fastalign.errors import UserError
from fastalign.models.precision import autocast

DECISIVE = ("objective", "seed", "student", "teacher", "decoder", "masks", "loss.name", "data.train")
DECISIVE += ("optim.name", "optim.batch_size", "optim.epochs")
"""What may not change between a checkpoint and its continuation."""

VALIDATION = "validation loss"


class Run:
    """Everything that a run consists of, between its configuration and its folder."""

    def __init__(self, config: Config, world: World):
        self.config, self.world, self.folder = config, world, Path(config.output)
        objective, self.backbone = build.build_objective(config)
        self.dtype = build.precision(config, world.device)
        if self.dtype == torch.bfloat16:
            objective.teacher.store_as(build.teacher_dtype(config, world.device))
        self.objective = objective.to(world.device)
        attention = build.choose_attention(config, objective, world.device)
        self.train, self.val = build.build_loaders(config, world, self.backbone)
        self.trained = [p for p in objective.parameters() if p.requires_grad]
        optim = config.optim
        options = {"lr": optim.lr, "betas": optim.betas, "weight_decay": optim.weight_decay}
        self.optimizer, note = make_optimizer(optim.name, self.trained, world.device, **options)
        # What was chosen for the user, said at the start.
        self.notes = [attention, *([note] if note else [])]
        self.average = MovingAverage(objective.student, optim.ema) if optim.ema else None
        self.checkpoints = Checkpoints(self.folder / "checkpoints", config.checkpoint.keep)
        self.step, self.best, self.val_loss = 0, None, None
        self.best_by = f"probes of {config.probe.data}" if config.probe.best else VALIDATION
        self.probed: dict[str, float] | None = None
        """the newest probe: step, macro_recall, map, loss"""
        self.judged_at = 0
        """the step up to which validation and probes at the ends of epochs are done"""
        self.status = Status(world, sticky=config.faults["nonfinite"] == "stop")
        self.skipped_in_a_row = 0
        if world.main:
            self.checkpoints.clean()
        self.epoch_steps = len(self.train) // optim.accumulate
        self.total_steps = optim.epochs * self.epoch_steps
        self.last_step = min(config.max_steps or self.total_steps, self.total_steps)
        self.resume()
        if config.efficiency.compile:
            objective.compile(blocks=config.efficiency.compile == "blocks")
        self.model: nn.Module = objective
        if world.size > 1:
            self.model = DistributedDataParallel(
                objective, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    def autocast(self):
        """bf16 autocast, or nothing in fp32."""
        return autocast(self.world.device, self.dtype)

    def fixed_weights(self):
        """Around passes between which no weight changes: autocast casts each weight once, not once a pass.

        An outer autocast, itself off, keeps the cache of those within it until its own end.
        """
        reduced = self.dtype == torch.bfloat16
        return torch.autocast(self.world.device.type, enabled=False) if reduced else nullcontext()

    @property
    def owes_judgement(self) -> bool:
        """Whether an epoch or the run has ended at this step, and its validation and probe are still to be done."""
        ended = self.step % self.epoch_steps == 0 or self.step == self.last_step
        return ended and self.judged_at != self.step

    def state(self) -> dict:
        """What a checkpoint holds: tensors and plain values only."""
        return {
            "student": self.objective.student.state_dict(),
            "target_scale": self.objective.target_scale.item(),
            "optimizer": self.optimizer.state_dict(),
            "optimizer_class": class_name(self.optimizer),
            "average": self.average.state if self.average else None,
            "step": self.step,
            "best": self.best,
            "best_by": self.best_by,
            "val_loss": self.val_loss,
            "probed": self.probed,
            "judged_at": self.judged_at,
            "skipped_in_a_row": self.skipped_in_a_row,
            "config": self.config.model_dump(mode="json"),
        }

    def resume(self) -> None:
        """Continue from the newest checkpoint of the folder, if there is one."""
        state = self.checkpoints.newest()
        if state is None:
            return
        path = self.checkpoints.path(self.checkpoints.steps()[-1])
        self._same_run(state, path)
        try:
            self.objective.student.load_state_dict(state["student"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.average:
                self.average.load(state["average"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is a checkpoint of another model: choose another output than {self.folder} "
                f"({str(error).splitlines()[-1].strip()})"
            ) from error
        self.objective.target_scale.fill_(state["target_scale"])
        self.step, self.best, self.val_loss = state["step"], state["best"], state["val_loss"]
        self.probed = state.get("probed")
        self.judged_at = state.get("judged_at", self.step)
        self.skipped_in_a_row = state.get("skipped_in_a_row", 0)
        before = state.get("best_by", VALIDATION)
        if before != self.best_by:
            # Their scores do not compare, and what an earlier probe would have chosen is no longer there.
            self.best = None
            self.notes.append(
                f"the best checkpoint is chosen anew from here on: by {self.best_by}, not {before}"
            )

    def _same_run(self, state: dict, path: Path) -> None:
        """Refuse a checkpoint of another run: what decides the losses must be as it was."""
        if not isinstance(state, dict) or not {"student", "optimizer", "step", "config"} <= state.keys():
            raise UserError(f"{path} is not a checkpoint of a run: remove it, or choose another output")
        before, now = state["config"], self.config.model_dump(mode="json")
        for key in DECISIVE:
            section, _, name = key.partition(".")
            old, new = ((tree[section].get(name) if name else tree[section]) for tree in (before, now))
            if old != new:
                raise UserError(
                    f"{path} is a checkpoint of another model or run: {key} was {old}, is {new}; "
                    "set it back, or choose another output"
                )
        old, new = state.get("optimizer_class"), class_name(self.optimizer)
        if old not in (None, new):
            raise UserError(
                f"{path} holds the state of {old}, and optim.name={self.config.optim.name} means {new} here: go on "
                "where apex is as it was, or choose another output"
            )


def improves(run: Run, *, evaluated: bool = False) -> bool:
    """Whether this step has the best probe so far where that chooses, else the lowest validation loss."""
    if not run.config.probe.best:
        return evaluated and (run.best is None or run.val_loss < run.best)
    return probed_now(run) is not None and (run.best is None or _score(run) > run.best)


def probed_now(run: Run) -> dict[str, float] | None:
    """The probe of this very step, if there was one."""
    return run.probed if run.probed and run.probed["step"] == run.step else None


def _score(run: Run) -> float:
    return -math.inf if math.isnan(run.probed["map"]) else run.probed["map"]


def save(run: Run, *, evaluated: bool = False) -> None:
    """Write a checkpoint, and the backbone where it is the best so far (the newest, where nothing chooses).

    Args:
        run: the run.
        evaluated: `val_loss` is that of this step.
    """
    best, by_probe = improves(run, evaluated=evaluated), run.config.probe.best
    if best:
        run.best = _score(run) if by_probe else run.val_loss
    if run.world.main:
        run.checkpoints.save(run.state(), run.step, best=best)
        if (best or (run.val is None and not by_probe)) and not run.config.student.freeze:
            save_backbone(run, evaluated=evaluated)
    run.world.barrier()


def save_backbone(run: Run, *, evaluated: bool) -> None:
    """The aligned backbone with timm's keys, without the student's head, and what one must know to use it."""
    weights = run.average.state if run.average else run.objective.student.state_dict()
    weights = {
        name.removeprefix("encoder."): value for name, value in weights.items() if name.startswith("encoder.")
    }
    weights = {
        name: value.contiguous().float() for name, value in weights.items() if not name.startswith("head.")
    }
    kwargs = {**run.backbone.recipe["kwargs"], "num_classes": 0}
    if run.backbone.spec.pool == "map":
        kwargs["global_pool"] = ""  # the student has no pooling to save
    facts = {
        "name": run.backbone.recipe["name"],
        "kwargs": kwargs,
        "softcap": run.config.student.softcap,
        "norm_eps": getattr(run.objective.student.encoder.norm, "eps", None),
        **run.backbone.data,
        "features": "the tokens after the final norm; prefix tokens first",
        "objective": run.config.objective,
        "step": run.step,
        "val_loss": run.val_loss if evaluated else None,
        "fastalign": __version__,
    }
    if probed_now(run):
        facts["probe"] = probed_now(run)
    metadata = {"format": "pt", "softcap": str(run.config.student.softcap)}
    content = safetensors.torch.save({name: value.cpu() for name, value in weights.items()}, metadata)
    write_atomically(run.folder / "backbone.safetensors", lambda file: file.write(content))
    text = json.dumps(facts, indent=2) + "\n"
    write_atomically(run.folder / "backbone.json", lambda file: file.write(text.encode()))
