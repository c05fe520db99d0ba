"""Training of heads and classifiers on batches, and their evaluation."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastalign.backbones.precision import autocast
from fastalign.data.loader import Batch
from fastalign.evaluation.results import difference
from fastalign.training.checkpoint_files import Checkpoints
from fastalign.training.distributed import World, on_first_rank
from fastalign.training.update import seed_update
from fastalign.utils.errors import UserError
from fastalign.utils.files import remove_leftovers

_SAY_SECONDS = 30.0
_DIVERGED = 104.0  # exp(-104) is 0 in float32: the correct class has probability 0

Track = Callable[[Iterable, str, int], Iterable]  # (items, text, total) -> items, with progress


def say_progress(say: Callable[[str], None]) -> Track:
    """Report the progress of an iteration every half minute."""

    def track(items: Iterable, text: str, total: int) -> Iterator:
        said = time.monotonic()
        for number, item in enumerate(items, 1):
            yield item
            if time.monotonic() - said > _SAY_SECONDS:
                said = time.monotonic()
                say(f"{text}: {number} of {total} batches")

    return track


untracked = say_progress(lambda text: None)


@dataclass
class FeatureLoader:
    """Batches of features [n, ...] on one rank, with the interface of `Loader`."""

    features: Tensor
    batch_size: int
    device: torch.device
    # (epoch=...) -> its rows, without an incomplete last batch; None = all rows in order.
    order: Callable[..., np.ndarray] | None = None
    dtype: torch.dtype | None = None  # of the batches; None = as they are

    def __len__(self) -> int:
        count = len(self.features)
        return count // self.batch_size if self.order else -(-count // self.batch_size)

    def batches(self, epoch: int = 0) -> Iterator[Batch]:
        """The batches of an epoch; `images` are features."""
        order = self.order(epoch=epoch) if self.order else np.arange(len(self.features))
        for step in range(len(self)):
            ids = torch.from_numpy(order[step * self.batch_size : (step + 1) * self.batch_size])
            features = self.features[ids].to(self.device, non_blocking=True)
            yield Batch(features.to(self.dtype or features.dtype), ids)


@dataclass
class Fit:
    """Train a module with AdamW, one epoch at a time."""

    module: nn.Module  # on the device: a batch's `images` -> logits
    groups: list[dict]  # AdamW's parameter groups, each with the "factor" of its learning rate
    loss: Callable[[Tensor, Tensor], Tensor]  # (fp32 logits, labels) -> scalar
    labels: Callable[[Tensor], Tensor]  # of sample ids
    rate: Callable[[int], float]  # update, from 0 -> learning rate
    world: World  # ranks that share each batch
    dtype: torch.dtype  # of autocast
    seed: int = 0  # of stochastic depth
    accumulate: int = 1  # batches per update
    clip: float = 0.0  # largest gradient norm; 0 = no clipping
    step: int = 0

    def __post_init__(self):
        self.optimizer = torch.optim.AdamW(self.groups, betas=(0.9, 0.999), fused=True)
        self.model = self.module
        if self.world.size > 1:
            options = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
            self.model = DistributedDataParallel(self.module, **options)

    def epoch(self, batches: Iterator[Batch], updates: int) -> float:
        """Run this many updates. Returns the mean loss."""
        self.module.train()
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        with closing(batches):
            for _ in range(updates):
                total += self.update(batches)
        return total.item() / updates

    def update(self, batches: Iterator[Batch]) -> Tensor:
        """One update of the weights. Returns its loss, on the device."""
        lr = self.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        seed_update(self.seed, self.step, self.world.rank)
        total = torch.zeros((), device=self.world.device)
        for part in range(self.accumulate):
            batch, last = next(batches), part == self.accumulate - 1
            labels = self.labels(batch.ids).to(self.world.device)
            with nullcontext() if last or self.world.size == 1 else self.model.no_sync():
                with autocast(self.world.device, self.dtype):
                    logits = self.model(batch.images)
                logits = logits.float()
                loss = self.loss(logits, labels)
                if batch.weight != 1:  # mixed with the batch in reverse order
                    loss = batch.weight * loss + (1 - batch.weight) * self.loss(logits, labels.flip(0))
                loss = loss / self.accumulate
                loss.backward()
            total += loss.detach()
        if self.clip:
            parameters = [parameter for group in self.groups for parameter in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return self.world.sum(total) / self.world.size

    def save(self, checkpoints: Checkpoints, **facts) -> None:
        """Writes a checkpoint in the background, without frozen weights, which are the backbone's own."""
        on_first_rank(self.world, checkpoints.wait)
        if self.world.main:
            frozen = {name for name, value in self.module.named_parameters() if not value.requires_grad}
            weights = {name: value for name, value in self.module.state_dict().items() if name not in frozen}
            state = {"weights": weights, "optimizer": self.optimizer.state_dict(), "step": self.step}
            checkpoints.save(state | facts, self.step)

    def resume(self, checkpoints: Checkpoints, identity: dict, progress: dict) -> None:
        """Continues from the newest checkpoint, if any; it updates `progress`. UserError: of another identity."""
        if self.world.main:
            remove_leftovers(checkpoints.folder)
        step, state, _ = checkpoints.resume(self.world)
        if step is None:
            return
        if changed := difference(state["identity"], identity):
            raise UserError(f"{checkpoints.folder}: {changed}: set it back, or choose another --output")
        self.module.load_state_dict(state["weights"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = step
        progress |= state["progress"]


def check_loss(loss: float, about: str) -> None:
    """Raise a UserError if the loss on the validation split shows that training has diverged."""
    if not loss < _DIVERGED:
        raise UserError(f"--lr: the loss of {about} is {loss:.4g}; lower it, or check the backbone's weights")


@torch.no_grad()
def evaluate(
    module: nn.Module,
    batches: Iterator[Batch],
    labels: Callable[[Tensor], Tensor],
    counts: Any,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Adds logits, in evaluation mode under autocast of `dtype`, and labels of sample ids to counts of `results`."""
    module.eval()
    with closing(batches):
        for batch in batches:
            with autocast(device, dtype):
                logits = module(batch.images)
            counts.add(logits, labels(batch.ids).to(device))
