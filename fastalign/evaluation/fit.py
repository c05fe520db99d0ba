"""Training a head on frozen tokens, and judging it."""

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastalign.backbones.precision import autocast
from fastalign.evaluation.features import Features
from fastalign.evaluation.metrics import MultiClassCounts, MultiLabelCounts
from fastalign.training.optim import adamw, learning_rate
from fastalign.utils.errors import UserError

METRICS = ("macro_recall", "macro_precision", "macro_f1", "macro_accuracy", "accuracy", "map", "loss")
_EVALUATION_BATCH = 256


def check_options(options: object, checks: Iterable[tuple[str, bool, str]]) -> None:
    """Refuses the first option that is not right: (field, whether it is right, what it must be).

    Raises:
        UserError: it names the field as the command line does.
    """
    for name, right, rule in checks:
        if not right:
            value = getattr(options, name)
            shown = " ".join(map(str, value)) if isinstance(value, tuple | list) else value
            raise UserError(f"--{name.replace('_', '-')} {shown}: it must be {rule}")


@dataclass(frozen=True)
class Recipe:
    """How a head is trained; the defaults are the paper's."""

    epochs: int = 5
    batch_size: int = 32
    lr: float = 1e-3
    min_lr: float = 1e-4
    warmup_steps: int = 500
    """at most a tenth of all steps"""
    weight_decay: float = 0.01
    select: str = "macro_recall"
    """the metric on the validation split that chooses the epoch; macro recall where the labels have no such metric"""

    def __post_init__(self):
        checks = (
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("lr", 0 < self.lr < math.inf, "a positive number"),
            ("min_lr", 0 <= self.min_lr <= self.lr, f"from 0 to --lr, which is {self.lr:g}"),
            ("warmup_steps", self.warmup_steps >= 0, "0 or more"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "0 or more"),
            ("select", self.select in METRICS, f"one of {' '.join(METRICS)}"),
        )
        check_options(self, checks)

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
    """which set of tokens: how many of the last blocks are left out"""
    seed: int


def head_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy for `majority` targets [b, N] int64 (-1 = void), else binary cross-entropy, both means, fp32.

    Without a labelled patch the cross-entropy is 0, not a number that is none.
    """
    if targets.dtype == torch.int64:
        logits, targets = logits.float().flatten(0, 1), targets.flatten()
        total = functional.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
        return total / (targets >= 0).sum().clamp(min=1)
    return functional.binary_cross_entropy_with_logits(logits.float(), targets.float())


def fit(
    head: nn.Module,
    task: Task,
    train: Features,
    select: Features | None,
    recipe: Recipe,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[nn.Module, int, dict]:
    """Trains a head and keeps the epoch that is best on `select` by `recipe.select`, or the last one without.

    Args:
        head: fresh, tokens [b, T, D] -> logits; it is moved to the device.
        task: names the labels and tokens; the seed decides the order of the images.
        train: what it learns from; what does not fill a batch is left out, other images each epoch.
        select: what the epoch is chosen on; None = nothing is chosen, the last epoch stays.
        recipe: how.
        device: where.
        dtype: bf16 for autocast, or fp32.

    Returns:
        The head, the epoch (from 1), and the metrics on `select`, without it none.

    Raises:
        UserError: fewer images than a batch.
    """
    recipe.check_images(len(train))
    head = head.to(device)
    optimizer = adamw(head.parameters(), lr=recipe.lr, betas=(0.9, 0.999), weight_decay=recipe.weight_decay)
    steps = len(train) // recipe.batch_size
    total, step, best = steps * recipe.epochs, 0, None
    warmup = min(recipe.warmup_steps, total // 10)
    rate = partial(learning_rate, total=total, warmup=warmup, lr=recipe.lr, min_lr=recipe.min_lr, start=0.0)
    for epoch in range(1, recipe.epochs + 1):
        head.train()
        order = np.random.default_rng([task.seed, epoch]).permutation(len(train))
        for first in range(0, steps * recipe.batch_size, recipe.batch_size):
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            rows = np.sort(order[first : first + recipe.batch_size])
            loss = head_loss(*_answers(head, task, train, rows, device, dtype))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
        if select is None:
            continue
        found = evaluate(head, task, select, device=device, dtype=dtype, by_size=False)
        score = _score(found, recipe.select)
        if best is None or score > best[0]:
            best = score, epoch, copy.deepcopy(head.state_dict()), found
    if best is None:
        return head, recipe.epochs, {}
    _, epoch, state, found = best
    head.load_state_dict(state)
    return head, epoch, found


def _score(found: dict, select: str) -> float:
    """Higher is better; a metric that is not a number never wins."""
    score = found.get(select, found["macro_recall"])
    return -math.inf if math.isnan(score) else -score if select == "loss" else score


@torch.no_grad()
def evaluate(
    head: nn.Module,
    task: Task,
    features: Features,
    *,
    device: torch.device,
    dtype: torch.dtype,
    by_size: bool = True,
) -> dict:
    """The metrics of a head on a split (see `fastalign.evaluation.metrics`), and its `loss`.

    The loss is the mean over all answers: of patches (or images) and classes, for `majority` of labelled patches.
    """
    head.eval()
    if task.labels == "majority":
        counts = MultiClassCounts(features.classes, device)
    else:
        counts = MultiLabelCounts(features.classes, device, by_size=by_size and task.labels == "union")
    total, weights = torch.zeros(2, dtype=torch.float64, device=device)
    for first in range(0, len(features), _EVALUATION_BATCH):
        rows = np.arange(first, min(first + _EVALUATION_BATCH, len(features)))
        logits, targets = _answers(head, task, features, rows, device, dtype)
        weight = (targets >= 0).sum() if task.labels == "majority" else len(rows)
        total += head_loss(logits, targets).double() * weight
        weights += weight
        counts.add(logits, targets)
    return {"loss": (total / weights).item()} | counts.results()


def _answers(
    head: nn.Module,
    task: Task,
    features: Features,
    rows: np.ndarray,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    tokens = features.tokens[task.skip_blocks][torch.from_numpy(rows)].to(device, non_blocking=True).float()
    targets = features.labels(rows, task.labels).to(device, non_blocking=True)
    with autocast(device, dtype):
        return head(tokens), targets
