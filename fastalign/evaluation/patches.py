"""Heads on the tokens of patches: how they are trained, selected and evaluated."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fastalign.data.prefetch import Batch
from fastalign.evaluation.fit import FeatureLoader, Fit, evaluate
from fastalign.evaluation.metrics import PATCH_METRICS, MultiClassCounts, MultiLabelCounts, patch_loss
from fastalign.evaluation.options import Count, Options
from fastalign.evaluation.patch_features import PatchFeatures
from fastalign.training.distributed import World
from fastalign.training.optim import learning_rate
from fastalign.utils.errors import UserError

_EVALUATION_BATCH = 256


class Recipe(Options):
    """How a head is trained; the defaults are the paper's."""

    epochs: Count = 5
    batch_size: Count = 32
    lr: float = Field(1e-3, gt=0)
    min_lr: float = Field(1e-4, ge=0)
    warmup_steps: int = Field(500, ge=0)
    """at most a tenth of all updates"""
    weight_decay: float = Field(0.01, ge=0)
    select: Literal[PATCH_METRICS] = "macro_recall"
    """metric on val that chooses the epoch; macro recall for labels without that metric"""

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        if self.min_lr > self.lr:
            raise UserError(f"--min-lr {self.min_lr:g} is above --lr {self.lr:g}: lower it")
        return self

    def schedule(self, total: int) -> Callable[[int], float]:
        """The learning rate of each of so many updates."""
        warmup = min(self.warmup_steps, total // 10)
        rates = {"lr": self.lr, "min_lr": self.min_lr, "start": 0.0}
        return partial(learning_rate, total=total, warmup=warmup, **rates)

    def check_images(self, count: int) -> None:
        """Refuses a training split that does not fill a batch."""
        if count < self.batch_size:
            raise UserError(
                f"--batch-size {self.batch_size}: the training split has {count} images; lower it"
            )


@dataclass(frozen=True)
class Task:
    """One head on one set of tokens."""

    head: str
    labels: str
    skip_blocks: int
    seed: int


def fit_head(
    head: nn.Module,
    task: Task,
    train: PatchFeatures,
    val: PatchFeatures | None,
    recipe: Recipe,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[nn.Module, int, dict]:
    """Trains a fresh head and keeps the epoch that is best on `val` by `recipe.select`; without `val` the last one.

    Returns:
        The head, the epoch (from 1), and its metrics on `val`, {} without one.

    Raises:
        UserError: fewer images than a batch.
    """
    count, size = len(train), recipe.batch_size
    recipe.check_images(count)
    steps = count // size

    def order(epoch: int) -> np.ndarray:
        """Sorted within batches, so that files are read in order."""
        shuffled = np.random.default_rng([task.seed, epoch + 1]).permutation(count)
        return np.sort(shuffled[: steps * size].reshape(steps, size), 1).ravel()

    def loss(logits: Tensor, batch: Batch) -> Tensor:
        return patch_loss(logits, train.labels(batch.ids_host, task.labels).to(device))

    head = head.to(device)
    fit = Fit(
        head,
        [{"params": list(head.parameters()), "factor": 1.0, "weight_decay": recipe.weight_decay}],
        loss,
        recipe.schedule(steps * recipe.epochs),
        recipe.epochs,
        steps,
        World(0, 1, device),
        dtype,
    )
    loader = _loader(train, task, size, device, order)
    best, best_score = (head.state_dict(), recipe.epochs, {}), -math.inf
    for epoch, _ in fit.run(loader.batches):
        if val is None:
            continue
        found = evaluate_head(head, task, val, device=device, dtype=dtype, by_size=False)
        score = found.get(recipe.select, found["macro_recall"])
        score = -math.inf if math.isnan(score) else -score if recipe.select == "loss" else score
        if epoch == 1 or score > best_score:
            best, best_score = (copy.deepcopy(head.state_dict()), epoch, found), score
    state, epoch, found = best
    head.load_state_dict(state)
    return head, epoch, found


def evaluate_head(
    head: nn.Module,
    task: Task,
    features: PatchFeatures,
    *,
    device: torch.device,
    dtype: torch.dtype,
    by_size: bool = True,
) -> dict:
    """The metrics of a head on a split, and its mean `loss` over all answers (`majority`: labelled patches)."""
    if task.labels == "majority":
        counts = MultiClassCounts(features.classes, device)
    else:
        counts = MultiLabelCounts(features.classes, device, by_size=by_size and task.labels == "union")

    def add(logits: Tensor, batch: Batch) -> None:
        counts.add(logits, features.labels(batch.ids_host, task.labels).to(device))

    loader = _loader(features, task, _EVALUATION_BATCH, device)
    evaluate(head, loader.batches(), add, device, dtype)
    return counts.results()


def _loader(features: PatchFeatures, task: Task, batch_size: int, device: torch.device, order=None):
    tokens = features.tokens[task.skip_blocks]
    return FeatureLoader(tokens, batch_size=batch_size, device=device, order=order, dtype=torch.float32)
