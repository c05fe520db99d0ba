"""The probe: heads on the patch tokens of frozen encoders, trained, selected, evaluated, and shared among ranks."""

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastalign.data.loader import Batch
from fastalign.evaluation.features import Encoder, PatchFeatures, read_patch_features
from fastalign.evaluation.fit import FeatureLoader, Fit, Track, predict, untracked
from fastalign.evaluation.heads import TokenShape, make_patch_head, supports
from fastalign.evaluation.label_maps import LabelledImages
from fastalign.evaluation.metrics import MultiClassCounts, MultiLabelCounts, patch_loss
from fastalign.evaluation.options import Plan, Recipe
from fastalign.training.command import report_rank_error
from fastalign.training.distributed import World
from fastalign.utils.errors import UserError

_EVALUATION_BATCH = 256


@dataclass(frozen=True)
class Task:
    """One head on one set of tokens."""

    head: str
    labels: str
    skip_blocks: int
    seed: int

    def loader(
        self, features: PatchFeatures, batch_size: int, device: torch.device, order=None
    ) -> FeatureLoader:
        """Batches of the tokens, in fp32."""
        return FeatureLoader(features.tokens[self.skip_blocks], batch_size, device, order, torch.float32)


def fit_head(
    head: nn.Module,
    task: Task,
    train: PatchFeatures,
    val: PatchFeatures | None,
    recipe: Recipe,
    *,
    device: torch.device,
    dtype: torch.dtype,
    track: Track = untracked,
) -> tuple[nn.Module, int, dict]:
    """Trains a fresh head and keeps the epoch that is best on `val` by `recipe.select`; without `val` the last one.

    Returns:
        The head, the epoch (from 1), and its metrics on `val`, {} without one.
    """
    count, size = len(train), recipe.batch_size
    steps = count // size

    def order(epoch: int) -> np.ndarray:
        """Sorted within batches, so that files are read in order."""
        shuffled = np.random.default_rng([task.seed, epoch]).permutation(count)
        return np.sort(shuffled[: steps * size].reshape(steps, size), 1).ravel()

    def loss(logits: Tensor, batch: Batch) -> Tensor:
        return patch_loss(logits, train.labels(batch.ids.numpy(), task.labels).to(device))

    head = head.to(device)
    groups = [{"params": list(head.parameters()), "factor": 1.0, "weight_decay": recipe.weight_decay}]
    fit = Fit(head, groups, loss, recipe.schedule(steps * recipe.epochs), World(0, 1, device), dtype)
    loader = task.loader(train, size, device, order)
    best, best_score = (head.state_dict(), recipe.epochs, {}), -math.inf
    for epoch in range(1, recipe.epochs + 1):
        fit.epoch(track(loader.batches(epoch), f"epoch {epoch} of {recipe.epochs} of the head", steps), steps)
        if val is None:
            continue
        found = evaluate_head(head, task, val, device=device, dtype=dtype)
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
    track: Track = untracked,
) -> dict:
    """The metrics of a head on a split, and its mean `loss` over all answers (`majority`: labelled patches)."""
    if task.labels == "majority":
        counts = MultiClassCounts(features.classes, device)
    else:
        counts = MultiLabelCounts(features.classes, device, by_size=task.labels == "union")
    loader = task.loader(features, _EVALUATION_BATCH, device)
    batches = track(loader.batches(), "evaluation of the head", len(loader))
    for logits, batch in predict(head, batches, device, dtype):
        counts.add(logits, features.labels(batch.ids.numpy(), task.labels).to(device))
    return counts.results()


def probe(
    encoders: dict[str, Encoder],
    splits: dict[str, LabelledImages],
    plans: Sequence[Plan],
    world: World,
    *,
    report_on: Sequence[str] = ("test",),
    folder: Path | None = None,
    batch_size: int = 64,
    threads: int = 4,
    dtype: torch.dtype = torch.float32,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict]:
    """Trains and evaluates every head of the plans on every encoder; returns all rows of `probe.json` on every rank.

    Args:
        encoders: by the name that results carry.
        splits: train, val (which selects the epoch), and those of `report_on`.
        plans: heads, labels, seeds, recipe.
        report_on: splits that a finished head is evaluated on, once; `val` always is.
        folder, batch_size, threads, dtype: as of `read_patch_features`.
        say: gets progress lines.
    """
    count, largest = len(splits["train"]), max(plan.recipe.batch_size for plan in plans)
    if count < largest:
        raise UserError(f"--batch-size {largest}: the training split has {count} images; lower it")
    how = {"folder": folder, "batch_size": batch_size, "threads": threads, "dtype": dtype}
    read = {name: {} for name in encoders}
    for name, split in itertools.product(encoders, splits):
        if world.main:
            say(f"{name}: {len(splits[split])} images ({split})")
        read[name][split] = read_patch_features(encoders[name], splits[split], world, **how)
        if not read[name][split].image.any():
            raise UserError(f"the {split} split has void pixels only: check its label maps")
    # Heads of all encoders are shared out together, so that ranks wait for each other once, at the end.
    tasks = [
        (name, plan, Task(head, labels, skip, seed))
        for name, plan in itertools.product(encoders, plans)
        for skip, labels, head, seed in itertools.product(
            encoders[name].skip_blocks, plan.labels, plan.heads, plan.seeds
        )
        if supports(head, labels)
    ]
    rows = {}
    for number in range(world.rank, len(tasks), world.size):
        name, plan, task = tasks[number]
        with report_rank_error(world.rank):
            row = _probe_task(task, encoders[name].shape, read[name], plan, report_on, world.device, dtype)
        about = f"{task.labels} {task.head}, {task.skip_blocks} blocks skipped, seed {task.seed}"
        say(f"{name}: {about}: macro recall {row[report_on[-1]]['macro_recall']:.4f}")
        rows[number] = {"model": name, **row}
    for part in world.gather(rows):
        rows |= part
    return [rows[number] for number in range(len(tasks))]


def _probe_task(
    task: Task,
    shape: TokenShape,
    features: dict[str, PatchFeatures],
    plan: Plan,
    report_on: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
) -> dict:
    torch.manual_seed(task.seed)
    classes, where = features["train"].classes, {"device": device, "dtype": dtype}
    head = make_patch_head(task.head, task.labels, shape, classes, hidden=plan.hidden, layers=plan.layers)
    head, epoch, val = fit_head(head, task, features["train"], features["val"], plan.recipe, **where)
    if not math.isfinite(val["loss"]):
        about = f"{task.labels} {task.head}, seed {task.seed}"
        raise UserError(f"--lr: the loss of {about} is {val['loss']}; lower the rate")
    short = {name: value for name, value in val.items() if name not in ("per_class", "by_size")}
    reported = {
        name: evaluate_head(head, task, features[name], **where) for name in report_on if name != "val"
    }
    return {**asdict(task), "epoch": epoch, "val": short, **reported}
