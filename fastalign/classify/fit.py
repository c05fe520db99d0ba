"""Training a classifier: update, evaluate, select, save, continue."""

import math
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from fastalign.backbones.precision import autocast
from fastalign.classify.features import FeatureLoader
from fastalign.classify.model import parameter_groups
from fastalign.classify.options import Options
from fastalign.classify.scores import Tally, select
from fastalign.data.loader import Loader
from fastalign.training.checkpoint_files import Checkpoints, snapshot
from fastalign.training.distributed import World, on_first_rank
from fastalign.training.metrics import MetricLog, Speed
from fastalign.training.optim import learning_rate, seed_update
from fastalign.utils.errors import UserError

_BETAS = (0.9, 0.999)
_SAY_EVERY = 30.0
"""Seconds."""


@dataclass(frozen=True)
class Task:
    """What is learnt from and judged on, the same for every seed."""

    loaders: dict[str, Loader | FeatureLoader]
    "train, val, and perhaps test"
    labels: dict[str, Tensor]
    "[n] int64 on the device, by split"
    classes: int
    dtype: torch.dtype
    "of autocast"
    depth: int
    "blocks of the backbone"


def mixed_loss(logits: Tensor, labels: Tensor, *, weight: float, smoothing: float) -> Tensor:
    """Cross-entropy against a mixture of a batch's labels and the same reversed.

    Args:
        logits: [B, C].
        labels: [B] int64.
        weight: share of a sample's own label.
        smoothing: share of every label that is spread over all classes.
    """
    logits = logits.float()
    own = functional.cross_entropy(logits, labels, label_smoothing=smoothing)
    if weight == 1:
        return own
    other = functional.cross_entropy(logits, labels.flip(0), label_smoothing=smoothing)
    return weight * own + (1 - weight) * other


class Fit:
    """One seed's training.

    Args:
        model: on the device; gives logits [B, C] for what the loaders give.
        task: data.
        options: resolved.
        seed: of order, augmentation and stochastic depth.
        world: the ranks that share this training.
        say: told about every epoch.
        folder: for checkpoints and metrics.jsonl; None = neither.
        identity: plain values; a checkpoint with others is refused.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        options: Options,
        *,
        seed: int,
        world: World,
        say: Callable[[str], None] = lambda text: None,
        folder: Path | None = None,
        identity: dict | None = None,
    ):
        self.module, self.task, self.options, self.seed, self.world = model, task, options, seed, world
        self.say, self.identity = say, identity
        self.train = task.loaders["train"]
        self.epoch_steps = len(self.train) // options.accumulate
        self.total = options.epochs * self.epoch_steps
        groups = parameter_groups(
            model, depth=task.depth, decay=options.layer_decay or 1.0, weight_decay=options.weight_decay
        )
        self.trained = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=_BETAS, fused=True)
        self.step, self.best, self.curve = 0, None, []
        self.loss = torch.zeros((), dtype=torch.float64, device=world.device)
        self.folder = folder
        self.checkpoints = Checkpoints(folder / "checkpoints", keep=1) if folder else None
        if self.checkpoints:
            self._resume()
        self.model = model
        if world.size > 1:
            self.model = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)

    def run(self) -> dict:
        """Train to the end. Returns what `select` chose, and a line an epoch as "curve"."""
        while self.step < self.total:
            epoch = self.step // self.epoch_steps
            self._epoch(epoch)
            self._end(epoch)
            self._save()
        if self.checkpoints:
            on_first_rank(self.world, self.checkpoints.wait)
        return {"seed": self.seed, **self.best, "curve": self.curve}

    def _epoch(self, epoch: int) -> None:
        """The updates of an epoch that are left."""
        options, end = self.options, (epoch + 1) * self.epoch_steps
        log = speed = None
        if self.folder:
            log = MetricLog(self.folder, step=self.step or -1, main=self.world.main)
            speed = Speed(images=options.batch_size, ranks=self.world.size, flops=0, device=self.world.device)
        self.model.train()
        begun = time.monotonic()
        batches = self.train.batches(epoch, start=self.step % self.epoch_steps * options.accumulate)
        with closing(batches), closing(log) if log else nullcontext():
            while self.step < end:
                metrics = self.update(batches)
                saving = bool(options.save_every) and self.step % options.save_every == 0 and self.step != end
                if log:
                    speed.tick(metrics.pop("waited"))
                    log.add(step=self.step, epoch=epoch, **metrics)
                    if saving or self.step == end or time.monotonic() - begun > _SAY_EVERY:
                        begun = time.monotonic()
                        self._tell(log.flush(speed))
                if saving:
                    self._save()

    def _tell(self, lines: list[dict]) -> None:
        for line in lines[-1:]:
            self.say(
                f"seed {self.seed} step {line['step']}/{self.total}  loss {line['loss']:.4f}  "
                f"{line['images_per_second']:.0f} images/s  data wait {100 * line['data_wait']:.1f}%"
            )

    def update(self, batches) -> dict[str, Tensor | float]:
        """One update of the weights. Returns measurements that are still on the device."""
        options, task = self.options, self.task
        lr = learning_rate(
            self.step,
            total=self.total,
            warmup=round(options.warmup_epochs * self.epoch_steps),
            lr=options.lr,
            min_lr=options.min_lr,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        seed_update(self.seed, self.step, self.world.rank)
        total, waited = torch.zeros((), device=self.world.device), 0.0
        for part in range(options.accumulate):
            batch = next(batches)
            waited += batch.wait
            last = part == options.accumulate - 1
            with nullcontext() if last or self.world.size == 1 else self.model.no_sync():
                with autocast(self.world.device, task.dtype):
                    logits = self.model(batch.images)
                labels = task.labels["train"][batch.ids]
                loss = mixed_loss(logits, labels, weight=batch.weight, smoothing=options.label_smoothing)
                (loss / options.accumulate).backward()
            total += loss.detach() / options.accumulate
        norm = nn.utils.clip_grad_norm_(self.trained, options.clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss = self.world.sum(total) / self.world.size
        self.loss += loss
        self.step += 1
        return {"loss": loss, "grad_norm": norm, "lr": lr, "waited": waited}

    @torch.no_grad()
    def evaluate(self, split: str) -> dict[str, float | None]:
        """The figures of a split, over all ranks."""
        self.module.eval()
        tally = Tally(self.task.classes, self.world.device)
        with closing(self.task.loaders[split].batches()) as batches:
            for batch in batches:
                with autocast(self.world.device, self.task.dtype):
                    logits = self.module(batch.images)
                tally.add(logits, self.task.labels[split][batch.ids])
        return tally.figures(self.world)

    def _end(self, epoch: int) -> None:
        loss = self.loss.item() / self.epoch_steps
        self.loss.zero_()
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} in epoch {epoch + 1} of seed {self.seed}: lower --lr, or set --clip"
            )
        has_test = "test" in self.task.loaders
        self.best, val = select(self.best, epoch, self.options.epochs, self.evaluate, has_test=has_test)
        self.curve.append(
            {"epoch": epoch + 1, "train_loss": loss, "val_loss": val["loss"], "val_top1": val["top1"]}
        )
        self.say(
            f"seed {self.seed} epoch {epoch + 1}/{self.options.epochs}  loss {loss:.4f}  "
            f"val top-1 {100 * val['top1']:.2f}%"
        )

    def _save(self) -> None:
        if self.checkpoints is None:
            return
        on_first_rank(self.world, self.checkpoints.wait)
        if self.world.main:
            frozen = {name for name, value in self.module.named_parameters() if not value.requires_grad}
            weights = {name: value for name, value in self.module.state_dict().items() if name not in frozen}
            state = {
                "weights": weights,
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "loss": self.loss.item(),
                "best": self.best,
                "curve": self.curve,
                "identity": self.identity,
            }
            self.checkpoints.save(snapshot(state), self.step)

    def _resume(self) -> None:
        if self.world.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.checkpoints.clean()
        self.world.barrier()
        step, state, notes = self.checkpoints.resume(self.world)
        if step is None:
            return
        for note in notes:
            self.say(note)
        folder = self.checkpoints.folder
        if not isinstance(state, dict) or not {"weights", "identity", "step"} <= state.keys():
            raise UserError(f"{folder} holds no checkpoint of this command: choose another --output")
        if state["identity"] != self.identity:
            raise UserError(
                f"{folder} is of {difference(state['identity'], self.identity)}: set it back, remove the folder, or "
                "choose another --output"
            )
        self.module.load_state_dict(state["weights"], strict=False)  # frozen weights are the backbone's own
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.best, self.curve = state["step"], state["best"], state["curve"]
        self.loss.fill_(state["loss"])
        self.say(f"seed {self.seed}: resuming at step {self.step} of {self.total}")


def difference(before: dict, now: dict, path: str = "") -> str:
    """The first value that two trees of plain values do not share, in words."""
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict) and old != new:
            return difference(old, new, f"{path}{key}.")
        if old != new:
            return f"another setting ({path}{key} was {old}, is {new})"
    return "the same setting"
