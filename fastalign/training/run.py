"""A run: its configuration, the objects built from it, and its state."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastalign.backbones.precision import compute_dtype
from fastalign.config import Config
from fastalign.data.pipeline import BadSample
from fastalign.training import build
from fastalign.training.checkpoint_files import Checkpoints
from fastalign.training.command import HangTimer, Preemption, StopReason
from fastalign.training.distributed import World, on_first_rank
from fastalign.training.update import MovingAverage, Status, StepStatus, learning_rate
from fastalign.utils.errors import UserError
from fastalign.utils.files import checksum_of, remove_leftovers

_WEIGHTS = {".safetensors", ".pth", ".pt", ".bin", ".npz"}  # suffixes
MAX_CHECKPOINT_AGE = 15 * 60  # seconds, if `checkpoint.every_steps` is null


@dataclass
class TrainState:
    """The state of a run besides weights and moments, which `state_dict` converts for checkpoints."""

    step: int = 0  # updates done
    best: float | None = None  # score: of the probe (mAP) with `probe.best`, else the lowest validation loss
    val_loss: float | None = None  # of the last validation
    first_val_loss: float | None = None  # before the first update
    probed: dict[str, float] | None = None  # the last probe: step, macro_recall, map, loss
    last_eval_step: int = 0  # step of the last evaluation at the end of an epoch
    skipped_in_a_row: int = 0  # updates, because the loss or the gradient was not finite
    bad: set[int] = field(default_factory=set)  # ids known to every rank, without the quarantined ones
    changes: list[dict[str, Any]] = field(default_factory=list)  # by `resume=force`: step, key, before, now

    def state_dict(self) -> dict[str, Any]:
        """Plain values by name."""
        return {**vars(self), "bad": sorted(self.bad)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the values from a checkpoint."""
        vars(self).update({name: state[name] for name in vars(self)})
        self.bad = set(self.bad)

    @property
    def current_probe(self) -> dict[str, float] | None:
        """The probe of the current step, if there was one."""
        return self.probed if self.probed and self.probed["step"] == self.step else None


def itstime(step: int, every: int | None, last: int | None = None) -> bool:
    """Whether this step is a multiple of `every` (None = never) or the `last` one."""
    return step == last or (every is not None and step % every == 0)


class Run:
    """A run before its first step; `checkpoint.resume` continues from its folder.

    `preemption` records signals to stop; `labelled`: fingerprints of labelled data by key; those of rank 0 count.
    """

    def __init__(
        self, config: Config, world: World, preemption: Preemption | None = None, labelled: dict | None = None
    ):
        self.config, self.world, self.folder = config, world, Path(config.output)
        self.state, self.preemption = TrainState(), preemption or Preemption()
        optim, efficiency, device = config.optim, config.efficiency, world.device
        compared = {"seed", "max_steps", "objective", "decoder", "masks", "loss", "optim"}
        if not world.agree(config.model_dump_json(include=compared)):  # paths may differ between machines
            raise UserError("the ranks have different settings: start every machine with the same command")
        source = build.training_source(config, world)  # before weights are loaded, perhaps from the network
        objective, self.backbone = build.build_objective(config)
        self.dtype = compute_dtype(efficiency.precision, device)
        if not world.agree(self.dtype == torch.bfloat16):
            raise UserError("efficiency.precision=auto: not every rank's CPU has bf16; set bf16 or fp32")
        if self.dtype == torch.bfloat16:
            objective.teacher.store_as(build.teacher_dtype(config, device))
        self.objective = objective.to(device)
        attention = build.choose_attention(config, objective, device)
        self.train, self.val = build.build_loaders(config, world, self.backbone, source)
        self.trained = [p for p in objective.parameters() if p.requires_grad]
        options = {"lr": optim.lr, "betas": optim.betas, "weight_decay": optim.weight_decay}
        self.optimizer = torch.optim.AdamW(self.trained, fused=True, **options)
        chosen = "bf16" if self.dtype == torch.bfloat16 else "fp32"
        precision = chosen if efficiency.precision == "auto" else efficiency.precision
        self.notes = [f"precision: {precision}", attention]  # lines for the user
        self.average = MovingAverage(objective.student, optim.ema) if optim.ema else None
        self.checkpoints = Checkpoints(self.folder / "checkpoints", config.checkpoint.keep)
        if world.main:
            remove_leftovers(self.checkpoints.folder)
            remove_leftovers(self.folder)
        self.epoch_steps = len(self.train) // optim.accumulate
        self.total_steps = optim.epochs * self.epoch_steps
        self.last_step = min(config.max_steps or self.total_steps, self.total_steps)
        self.contents = on_first_rank(world, lambda: self._contents() | (labelled or {}))
        self.status = Status(world, sticky=config.faults.nonfinite == "stop")
        self.hang_timer = HangTimer(world, config.faults.timeout)
        if efficiency.compile:
            objective.compile(blocks=efficiency.compile == "blocks")
        self.model: nn.Module = objective
        if world.size > 1:
            how = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
            self.model = DistributedDataParallel(objective, **how)

    def _contents(self) -> dict[str, Any]:
        """Fingerprints of the data and weights at the paths in the configuration, by key."""
        found: dict[str, Any] = {"data.train": self.train.source.identity()}
        if self.val is not None:
            found["data.val"] = self.val.source.identity()
        for section in ("student", "teacher"):
            weights = getattr(self.config, section).weights
            if weights not in (None, "pretrained", "random"):
                place = Path(weights)
                inside = sorted(path for path in place.glob("*") if path.suffix in _WEIGHTS)
                found[f"{section}.weights"] = [checksum_of(inside if place.is_dir() else [place])]
        return found

    def cached_autocast(self) -> AbstractContextManager:
        """A context around passes with the same weights: a disabled outer autocast keeps the cache of inner ones."""
        return torch.autocast(self.world.device.type, enabled=False)

    def set_learning_rate(self) -> float:
        """Set and return the learning rate of the next update."""
        optim = self.config.optim
        min_lr = optim.lr / 10 if optim.min_lr is None else optim.min_lr
        warmup = round(optim.warmup_epochs * self.epoch_steps)
        lr = learning_rate(self.state.step, total=self.total_steps, warmup=warmup, lr=optim.lr, min_lr=min_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def beat(self, doing: str) -> None:
        """Restart the hang timer; `doing` is what this rank does next."""
        self.hang_timer.beat(self.state.step, doing)

    def own_status(self, ids: np.ndarray, bad: Sequence[BadSample]) -> StepStatus:
        """This rank's status of the next update, with its sample ids and its bad samples."""
        stop = StopReason.SAVE_FAILED if self.checkpoints.failed else self.preemption.reason
        by_time = self.world.main and self.config.checkpoint.every_steps is None  # rank 0's clock counts
        overdue = by_time and self.checkpoints.age > MAX_CHECKPOINT_AGE
        return StepStatus(self.state.step + 1, ids, tuple(bad), stop, overdue)

    @property
    def should_probe(self) -> bool:
        """Whether the student is probed at this step."""
        every = self.config.probe.every_steps or self.epoch_steps
        return self.config.probe.data is not None and itstime(self.state.step, every, self.last_step)

    @property
    def eval_pending(self) -> bool:
        """Whether an epoch or the run has ended at this step and is not yet evaluated."""
        step = self.state.step
        return itstime(step, self.epoch_steps, self.last_step) and self.state.last_eval_step != step

    @property
    def val_loss(self) -> float | None:
        """The validation loss of the current step, if there is one."""
        evaluated = self.val is not None and self.state.last_eval_step == self.state.step
        return self.state.val_loss if evaluated else None

    @property
    def finished(self) -> bool:
        """Whether nothing is left to train or to evaluate."""
        return self.state.step >= self.last_step and not self.eval_pending
