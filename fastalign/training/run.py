"""A run: what it consists of, how it is saved and how it continues."""

import math
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastalign.backbones.blocks import Block
from fastalign.backbones.precision import autocast
from fastalign.config import Config
from fastalign.data.bad_samples import BadSample
from fastalign.training import build, sharding
from fastalign.training.checkpoint import Checkpoints
from fastalign.training.continuation import changed_settings, contents, other_contents
from fastalign.training.distributed import World, on_first_rank
from fastalign.training.hang import HangTimer
from fastalign.training.optim import MovingAverage, class_name, make_optimizer
from fastalign.training.preemption import Preemption, StopReason
from fastalign.training.publish import publish_backbone
from fastalign.training.status import Status
from fastalign.utils.changes import Change
from fastalign.utils.errors import UserError
from fastalign.utils.files import remove_leftovers

MOST_LOST = 15 * 60
"""seconds of training that a run may lose where `checkpoint.every_steps` is null, however long its epochs are"""


class Run:
    """Everything that a run consists of, between its configuration and its folder."""

    def __init__(self, config: Config, world: World, also: dict | None = None):
        """`also`: fingerprints of what else the configuration names, by key; rank 0's count."""
        self.config, self.world, self.folder = config, world, Path(config.output)
        self.sharded = sharded(config, world)
        """Whether the student is split among the ranks; every rank must then take part in `state`."""
        objective, self.backbone = build.build_objective(config)
        self.dtype = self._precision()
        if self.dtype == torch.bfloat16:
            objective.teacher.store_as(build.teacher_dtype(config, world.device))
        self.objective = objective.to(world.device)
        attention = build.choose_attention(config, objective, world.device)
        self.train, self.val = build.build_loaders(config, world, self.backbone)
        if self.sharded:
            self._shard()
        self.trained = [p for p in objective.parameters() if p.requires_grad]
        optim = config.optim
        self.optimizer, note = make_optimizer(
            optim.name, self.trained, world.device, lr=optim.lr, **self._options()
        )
        precision = config.efficiency.precision
        precision = str(self.dtype).removeprefix("torch.") if precision == "auto" else precision
        self.notes = [f"precision: {precision}", attention, *([note] if note else [])]
        if config.efficiency.shard and not self.sharded:
            self.notes.append("efficiency.shard: one process shares with nobody, its student stays whole")
        self.average = MovingAverage(objective.student, optim.ema) if optim.ema else None
        self.checkpoints = Checkpoints(self.folder / "checkpoints", config.checkpoint.keep)
        self.step, self.best, self.val_loss = 0, None, None
        self.saved_at = time.monotonic()
        """of the newest checkpoint, or of the start"""
        self.probed: dict[str, float] | None = None
        """the newest probe: step, macro_recall, map, loss"""
        self.judged_at = 0
        """the step up to which validation and probes at the ends of epochs are done"""
        self.status = Status(world, sticky=config.faults["nonfinite"] == "stop")
        self.skipped_in_a_row = 0
        self.preemption: Preemption | None = None
        self.hang_timer: HangTimer | None = None
        self.listed: dict[str, set[str]] = {}
        """names of bad samples in each list of the run folder, once it was read"""
        self.bad: set[int] = set()
        """the training samples that every rank knows to be bad, but for the quarantined"""
        if world.main:
            self.checkpoints.clean()
            remove_leftovers(self.folder)
        self.epoch_steps = len(self.train) // optim.accumulate
        self.total_steps = optim.epochs * self.epoch_steps
        self.last_step = min(config.max_steps or self.total_steps, self.total_steps)
        self.contents = on_first_rank(world, lambda: contents(config, self.train, self.val) | (also or {}))
        """fingerprints of what lies at the paths of the configuration, by key"""
        self.changes: list[dict] = []
        """what `resume=force` ever changed: step, key, before, now"""
        self.forced = self.resume()
        """what it changed at this start"""
        if config.efficiency.compile:
            objective.compile(blocks=config.efficiency.compile == "blocks")
        self.model: nn.Module = objective
        if world.size > 1 and not self.sharded:
            self.model = DistributedDataParallel(
                objective, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    def _precision(self) -> torch.dtype:
        dtype = build.precision(self.config, self.world.device)
        if not self.world.agree(dtype == torch.bfloat16):
            raise UserError(
                "efficiency.precision=auto: not every rank's CPU has bf16 instructions; set bf16 or fp32"
            )
        return dtype

    def _shard(self) -> None:
        sharding.from_first_rank(self.objective)
        student = self.objective.student
        sharding.shard(student, [part for part in student.modules() if isinstance(part, Block)], self.world)

    def autocast(self):
        """bf16 autocast, or nothing in fp32."""
        return autocast(self.world.device, self.dtype)

    def fixed_weights(self):
        """Around passes between which no weight changes: autocast casts each weight once, not once a pass.

        An outer autocast, itself off, keeps the cache of those within it until its own end.
        """
        reduced = self.dtype == torch.bfloat16
        # Split weights are put together anew for each pass: what was cast of them before would be kept in vain.
        kept = reduced and not self.sharded
        return torch.autocast(self.world.device.type, enabled=False) if kept else nullcontext()

    def accumulating(self, last: bool) -> AbstractContextManager:
        """Around one backward pass of an update: ranks add their gradients up in the last one only."""
        if self.sharded:
            self.objective.student.set_requires_gradient_sync(last)
        return nullcontext() if last or self.world.size == 1 or self.sharded else self.model.no_sync()

    def alone(self) -> AbstractContextManager:
        """Around passes without gradient of which ranks may have different numbers; every rank must enter."""
        return sharding.gathered(self.objective.student) if self.sharded else nullcontext()

    def clip(self) -> Tensor:
        """Clip the gradients by `optim.clip`. Returns their norm before, a scalar, the same on every rank."""
        limit = self.config.optim.clip or math.inf
        return sharding.whole(nn.utils.clip_grad_norm_(self.trained, limit))

    def beat(self, doing: str) -> None:
        """Restart the hang timer: what this rank does next."""
        if self.hang_timer is not None:
            self.hang_timer.beat(self.step, doing)

    def unwatched(self) -> AbstractContextManager:
        """Around what may take longer than `faults.timeout`."""
        return self.hang_timer.paused() if self.hang_timer else nullcontext()

    @property
    def overdue(self) -> bool:
        """Whether rank 0, whose clock counts, wants a checkpoint inside an epoch for the time that has gone by."""
        whole_epochs = self.config.checkpoint.every_steps is None
        return self.world.main and whole_epochs and time.monotonic() - self.saved_at > MOST_LOST

    @property
    def stop_reason(self) -> StopReason:
        """Why this rank wants the run to stop."""
        if self.checkpoints.failed:
            return StopReason.SAVE_FAILED
        return self.preemption.reason if self.preemption else StopReason.NONE

    def known_bad(self, samples: Iterable[BadSample]) -> list[BadSample]:
        """Take in what ranks found, as all of them do at the same update. Returns what is new, each once."""
        new = {sample.id: sample for sample in samples if sample.id not in self.bad}
        self.bad |= new.keys()
        self.train.bad.add(new.values())
        return list(new.values())

    @property
    def owes_judgement(self) -> bool:
        """Whether an epoch or the run has ended at this step, and its validation and probe are still to be done."""
        ended = self.step % self.epoch_steps == 0 or self.step == self.last_step
        return ended and self.judged_at != self.step

    def state(self) -> dict:
        """What a checkpoint holds: tensors and plain values only. Nothing is copied, see `checkpoint.snapshot`."""
        return {
            "student": self.objective.student.state_dict(),
            "target_scale": self.objective.target_scale.item(),
            "optimizer": self.optimizer.state_dict(),
            "optimizer_class": class_name(self.optimizer),
            "average": self.average.state if self.average else None,
            "step": self.step,
            "best": self.best,
            "val_loss": self.val_loss,
            "probed": self.probed,
            "judged_at": self.judged_at,
            "skipped_in_a_row": self.skipped_in_a_row,
            "bad": sorted(self.bad),
            "contents": self.contents,
            "changes": self.changes,
            "config": self.config.model_dump(mode="json"),
        }

    def resume(self) -> list[Change]:
        """Continue from the newest undamaged checkpoint of the folder, if there is one.

        Returns:
            The settings that `resume=force` changes here.

        Raises:
            UserError: it is of another run, or none can be read; SharedError where every rank knows.
        """
        step, state, notes = self.checkpoints.resume(self.world)
        self.notes += notes
        if step is None:
            return []
        path = self.checkpoints.path(step)
        if not isinstance(state, dict) or not self.state().keys() <= state.keys():
            raise UserError(
                f"{path} is not a checkpoint of a run of this version: remove it, or choose another output"
            )
        self.step, self.judged_at = state["step"], state["judged_at"]
        forced, notes = on_first_rank(self.world, lambda: self._changes(state, path))
        self.notes += notes
        self._same_optimizer(state, path)
        try:
            sharding.load_module(self.objective.student, state["student"])
            sharding.load_optimizer(self.optimizer, state["optimizer"])
            if self.average:
                # Where the average is new it begins here.
                self.average.load(state["average"] or state["student"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            reason = "; ".join(map(str, forced)) or str(error).splitlines()[-1].strip()
            raise UserError(
                f"{path} is a checkpoint of another model ({reason}): choose another output than {self.folder}"
            ) from error
        for group in self.optimizer.param_groups:
            group.update(self._options())  # the checkpoint has its own
        self.objective.target_scale.fill_(state["target_scale"])
        self.best, self.val_loss, self.probed = state["best"], state["val_loss"], state["probed"]
        self.skipped_in_a_row, self.bad = state["skipped_in_a_row"], set(state["bad"])
        self.changes = state["changes"] + [{"step": self.step, **each._asdict()} for each in forced]
        if any(change.key == "data.train" for change in forced):
            self.bad = set()  # numbers of samples in the data set before
        if forced:
            self.best = None  # what was measured then does not compare with what will be
            self.notes += [f"resume=force: from step {self.step} on {each}" for each in forced]
            self.notes.append(
                "the target scale is measured again, and the best checkpoint is chosen anew from here on"
            )
        on_first_rank(self.world, lambda: self._catch_up(state))
        return forced

    def _catch_up(self, state: dict) -> None:
        """What a writer that was killed had still to do after the checkpoint itself."""
        if state.get("is_best"):
            self.checkpoints.make_best(state["step"])
        publish_backbone(self.folder, state)
        self.checkpoints.prune()

    def _options(self) -> dict:
        """What the optimiser is told of the configuration; the learning rate comes with each update."""
        return {"betas": self.config.optim.betas, "weight_decay": self.config.optim.weight_decay}

    def _changes(self, state: dict, path: Path) -> tuple[list[Change], list[str]]:
        places = other_contents(state["contents"], self.contents, self.train, self.val)
        return changed_settings(state, path, self.config, places, finished=self.finished)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to train or to judge."""
        return self.step >= self.last_step and not self.owes_judgement

    def _same_optimizer(self, state: dict, path: Path) -> None:
        old, new = state["optimizer_class"], class_name(self.optimizer)
        if old != new:
            raise UserError(
                f"{path} holds the state of {old}, and optim.name={self.config.optim.name} means {new} here: go on "
                "where apex is as it was, or choose another output"
            )


def sharded(config: Config, world: World) -> bool:
    """Whether `efficiency.shard` splits the student, which takes several ranks.

    Raises:
        UserError: a setting that does not go with it.
    """
    if not config.efficiency.shard:
        return False
    others = {
        "efficiency.compile": config.efficiency.compile
        and "its passes exchange weights, which no graph holds",
        "probe.data": config.probe.data is not None and "a probe copies the whole student on one rank",
        "optim.name": config.optim.name != "adamw" and "apex updates whole tensors only",
    }
    for key, reason in others.items():
        if reason:
            raise UserError(f"efficiency.shard goes not with {key} ({reason}): remove one of them")
    return world.size > 1
