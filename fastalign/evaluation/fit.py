"""The training loop of heads and classifiers, their evaluation, and a folder from which a fit is resumed."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastalign.backbones.precision import autocast
from fastalign.data.loader import Batch
from fastalign.evaluation.options import ImageOptions
from fastalign.evaluation.results import difference
from fastalign.training.checkpoint_files import Checkpoints, snapshot
from fastalign.training.distributed import World, on_first_rank
from fastalign.training.metrics import MetricLog, Speed
from fastalign.training.optim import seed_update
from fastalign.utils.errors import UserError

_SAY_SECONDS = 30.0


class FeatureLoader:
    """Batches of features [n, ...] on one rank, in the form of a `Loader`'s.

    `order` gives the rows of an epoch, of which an incomplete last batch is dropped; None = all rows in order.
    """

    def __init__(
        self,
        features: Tensor,
        *,
        batch_size: int,
        device: torch.device,
        order: Callable[[int], np.ndarray] | None = None,
        dtype: torch.dtype | None = None,
    ):
        self.features, self.batch_size, self.device, self.order = features, batch_size, device, order
        self.dtype = dtype or features.dtype

    def __len__(self) -> int:
        count = len(self.features)
        return count // self.batch_size if self.order else -(-count // self.batch_size)

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number `start` on; `images` are features."""
        order = self.order(epoch) if self.order else np.arange(len(self.features))
        for step in range(start, len(self)):
            rows = order[step * self.batch_size : (step + 1) * self.batch_size]
            ids = torch.from_numpy(rows)
            features = self.features[ids.to(self.features.device)].to(self.device, non_blocking=True)
            yield Batch(features.to(self.dtype), ids.to(self.device), rows, 0.0)


@dataclass
class Fit:
    """Trains a module with AdamW; its owner evaluates after each epoch."""

    module: nn.Module  # on the device: a batch's `images` -> logits
    groups: list[dict]  # AdamW's parameter groups, each with the "factor" of its learning rate
    loss: Callable[[Tensor, Batch], Tensor]  # (logits, batch) -> scalar
    rate: Callable[[int], float]  # update, from 0 -> learning rate
    epochs: int
    epoch_steps: int  # updates
    world: World  # ranks that share each batch
    dtype: torch.dtype  # of autocast
    seed: int = 0  # of stochastic depth
    accumulate: int = 1  # batches per update
    clip: float = 0.0  # largest gradient norm; 0 = any
    step: int = 0

    def __post_init__(self):
        self.optimizer = torch.optim.AdamW(self.groups, betas=(0.9, 0.999), fused=True)
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.world.device)
        self.model = self.module
        if self.world.size > 1:
            self.model = DistributedDataParallel(
                self.module, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    @property
    def total(self) -> int:
        """Updates in all."""
        return self.epochs * self.epoch_steps

    def run(
        self,
        batches: Callable[[int, int], Iterator[Batch]],
        after_update: Callable[[int, dict], None] | None = None,
    ) -> Iterator[tuple[int, float]]:
        """Trains from the present step to the end; yields after each epoch its number, from 1, and its mean loss.

        `batches` gives the batches of (epoch from 0, first batch), `after_update` gets epoch and measurements.
        """
        while self.step < self.total:
            epoch, done = divmod(self.step, self.epoch_steps)
            self.module.train()
            with closing(batches(epoch, done * self.accumulate)) as parts:
                while self.step < (epoch + 1) * self.epoch_steps:
                    measured = self.update(parts)
                    if after_update:
                        after_update(epoch, measured)
            loss = self.loss_sum.item() / self.epoch_steps
            self.loss_sum.zero_()
            yield epoch + 1, loss

    def update(self, batches: Iterator[Batch]) -> dict[str, Tensor | float]:
        """One update of the weights. Returns measurements that are still on the device."""
        lr = self.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        seed_update(self.seed, self.step, self.world.rank)
        total, waited = torch.zeros((), device=self.world.device), 0.0
        for part in range(self.accumulate):
            batch = next(batches)
            waited += batch.wait
            last = part == self.accumulate - 1
            with nullcontext() if last or self.world.size == 1 else self.model.no_sync():
                with autocast(self.world.device, self.dtype):
                    logits = self.model(batch.images)
                loss = self.loss(logits, batch) / self.accumulate
                loss.backward()
            total += loss.detach()
        parameters = (parameter for group in self.groups for parameter in group["params"])
        norm = nn.utils.clip_grad_norm_(parameters, self.clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss = self.world.sum(total) / self.world.size
        self.loss_sum += loss
        self.step += 1
        return {"loss": loss, "grad_norm": norm, "lr": lr, "waited": waited}


@torch.no_grad()
def evaluate(
    module: nn.Module,
    batches: Iterator[Batch],
    add: Callable[[Tensor, Batch], None],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Passes the logits of every batch to `add`, in evaluation mode and under autocast of `dtype`."""
    module.eval()
    with closing(batches):
        for batch in batches:
            with autocast(device, dtype):
                logits = module(batch.images)
            add(logits, batch)


class RunFolder:
    """Keeps a fit resumable: sets it to the newest checkpoint in `folder`, and restores `progress` in place.

    `progress` are plain values that the owner changes. UserError where the checkpoint has another `identity`.
    """

    def __init__(
        self,
        folder: Path,
        fit: Fit,
        progress: dict[str, Any],
        identity: dict,
        options: ImageOptions,
        say: Callable[[str], None],
        name: str,
    ):
        self.fit, self.progress, self.identity = fit, progress, identity
        self.save_every, self.say, self.name = options.save_every, say, name
        self.checkpoints = Checkpoints(folder / "checkpoints", keep=1)
        world = fit.world
        if world.main:
            folder.mkdir(parents=True, exist_ok=True)
            self.checkpoints.clean()
        world.barrier()
        self._resume()
        self.log = MetricLog(folder, step=fit.step or -1, main=world.main)
        self.speed = Speed(images=options.batch_size, ranks=world.size, flops=0, device=world.device)
        self.said = time.monotonic()

    def after_update(self, epoch: int, measured: dict) -> None:
        """Logs an update, and saves within an epoch where that is due."""
        fit = self.fit
        at_end = fit.step % fit.epoch_steps == 0
        saving = self.save_every and fit.step % self.save_every == 0 and not at_end
        self.speed.tick(measured.pop("waited"))
        self.log.add(step=fit.step, epoch=epoch, **measured)
        if saving or at_end or time.monotonic() - self.said > _SAY_SECONDS:
            self.said = time.monotonic()
            for line in self.log.flush(self.speed)[-1:]:
                self.say(
                    f"{self.name} step {line['step']}/{fit.total}  loss {line['loss']:.4f}  "
                    f"{line['images_per_second']:.0f} images/s  data wait {100 * line['data_wait']:.1f}%"
                )
        if saving:
            self.save()

    def save(self) -> None:
        """Writes a checkpoint in the background."""
        fit = self.fit
        on_first_rank(fit.world, self.checkpoints.wait)
        if fit.world.main:
            frozen = {name for name, value in fit.module.named_parameters() if not value.requires_grad}
            weights = {name: value for name, value in fit.module.state_dict().items() if name not in frozen}
            state = {"weights": weights, "optimizer": fit.optimizer.state_dict(), "step": fit.step}
            state |= {"loss": fit.loss_sum.item(), "identity": self.identity, **self.progress}
            self.checkpoints.save(snapshot(state), fit.step)
        self.speed.start()

    def close(self) -> None:
        """Waits for the last checkpoint."""
        self.log.close()
        on_first_rank(self.fit.world, self.checkpoints.wait)

    def _resume(self) -> None:
        fit, folder = self.fit, self.checkpoints.folder
        step, state, notes = self.checkpoints.resume(fit.world)
        if step is None:
            return
        for note in notes:
            self.say(note)
        if (before := state.get("identity", {})) != self.identity:
            changed = difference(before, self.identity)
            raise UserError(
                f"{folder}: {changed}: set it back, remove the folder, or choose another --output"
            )
        fit.module.load_state_dict(state["weights"], strict=False)  # frozen weights are the backbone's own
        fit.optimizer.load_state_dict(state["optimizer"])
        fit.step = state["step"]
        fit.loss_sum.fill_(state["loss"])
        self.progress.update({name: state[name] for name in self.progress})
        self.say(f"{self.name}: resuming at step {fit.step} of {fit.total}")
