"""The probe: heads on frozen encoders, all combinations, shared among the ranks."""

import contextlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import model_validator

from fastalign.evaluation.cache import ArrayFiles, check_space
from fastalign.evaluation.heads import PATCH_HEADS, PATCH_LABELS, TokenShape, make_patch_head, supports
from fastalign.evaluation.options import Count, Distinct, Options, Seeds
from fastalign.evaluation.pairs import LabelledImages
from fastalign.evaluation.patch_features import Encoder, PatchFeatures, feature_files, read_patch_features
from fastalign.evaluation.patches import Recipe, Task, evaluate_head, fit_head
from fastalign.training.command import report_rank_error
from fastalign.training.distributed import World
from fastalign.utils.errors import UserError


class Plan(Options):
    """The heads that are trained on each encoder."""

    heads: Annotated[tuple[Literal[PATCH_HEADS], ...], Distinct] = ("transformer",)
    labels: Annotated[tuple[Literal[PATCH_LABELS], ...], Distinct] = ("union",)
    seeds: Seeds = (0,)
    recipe: Recipe = Recipe()
    hidden: Count = 1024
    """width of the mlp head"""
    layers: Count = 2
    """blocks of the transformer heads"""

    @model_validator(mode="after")
    def _check(self) -> "Plan":
        for head in self.heads:
            fit = [labels for labels in PATCH_LABELS if supports(head, labels)]
            if not set(fit) & set(self.labels):
                raise UserError(f"--heads {head} needs one of --labels {' '.join(fit)}")
        for labels in self.labels:
            fit = [head for head in PATCH_HEADS if supports(head, labels)]
            if not set(fit) & set(self.heads):
                raise UserError(f"--labels {labels} needs one of --heads {' '.join(fit)}")
        return self

    def tasks(self, encoder: Encoder) -> list[Task]:
        """Every combination that a head supports."""
        combinations = itertools.product(encoder.skip_blocks, self.labels, self.heads, self.seeds)
        return [
            Task(head, labels, skip, seed)
            for skip, labels, head, seed in combinations
            if supports(head, labels)
        ]


def probe(
    encoders: dict[str, Encoder],
    splits: dict[str, LabelledImages],
    plans: Sequence[Plan],
    world: World,
    *,
    report_on: Sequence[str] = ("test",),
    cache: Path | None = None,
    keep_features: bool = True,
    batch_size: int = 64,
    threads: int = 4,
    dtype: torch.dtype = torch.float32,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict]:
    """Trains and evaluates every head of the plans on every encoder.

    Args:
        encoders: by the name that results carry.
        splits: train, val (which selects the epoch), and those of `report_on`.
        plans: heads, labels, seeds, recipe.
        world: with several ranks, `cache` is needed and the heads are shared out.
        report_on: splits that a finished head is evaluated on, once; `val` always is.
        cache: folder of the features; None = in memory.
        keep_features: leave in `cache` the features that this call read.
        batch_size: images per forward pass of the backbone.
        threads: reading and decoding.
        dtype: of autocast.
        say: gets a line about each step.

    Returns:
        On every rank all rows, as `probe.json` has them.

    Raises:
        UserError: a batch larger than the training split, a split without labels, too little space, a loss that is
            not finite.
    """
    for plan in plans:
        plan.recipe.check_images(len(splits["train"]))
    how = {"batch_size": batch_size, "threads": threads, "dtype": dtype}
    read, fresh = _read(encoders, splits, world, cache, say, how)
    # Heads of all encoders are shared out together, so that ranks wait for each other once, at the end.
    tasks = [(name, plan, task) for name in encoders for plan in plans for task in plan.tasks(encoders[name])]
    rows = {}
    for number in range(world.rank, len(tasks), world.size):
        name, plan, task = tasks[number]
        features = {split: read[name, split] for split in splits}
        with report_rank_error(world.rank):
            row = _probe_task(task, encoders[name].shape, features, plan, report_on, world.device, dtype)
        about = f"{task.labels} {task.head}, {task.skip_blocks} blocks skipped, seed {task.seed}"
        say(f"{name}: {about}: macro recall {row[report_on[-1]]['macro_recall']:.4f}")
        rows[number] = {"model": name, **row}
    for part in world.gather(rows):
        rows |= part
    if fresh and world.main and not keep_features:
        for each in fresh:
            each.remove()
        with contextlib.suppress(OSError):
            cache.rmdir()  # unless it holds something else
    return [rows[number] for number in range(len(tasks))]


def _read(
    encoders: dict[str, Encoder],
    splits: dict[str, LabelledImages],
    world: World,
    cache: Path | None,
    say: Callable[[str], None],
    how: dict,
) -> tuple[dict[tuple[str, str], PatchFeatures], list[ArrayFiles]]:
    """Features by encoder and split, and the files that were not there before."""
    files, read = {}, {}
    for name, split in itertools.product(encoders, splits) if cache else ():
        files[name, split] = feature_files(encoders[name], splits[split], cache, how["dtype"])
    fresh = [each for each in files.values() if not each.complete()]
    if world.main and fresh:
        check_space(cache, fresh)
    for name, split in itertools.product(encoders, splits):
        known = cache is not None and files[name, split].complete()
        if world.main:
            say(f"{name}: {len(splits[split])} images ({split}){', read before' if known else ''}")
        read[name, split] = read_patch_features(encoders[name], splits[split], world, folder=cache, **how)
        if not read[name, split].image.any():
            raise UserError(f"the {split} split has void pixels only: check its label maps")
    return read, fresh


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
    del val["per_class"]
    reported = {
        each: evaluate_head(head, task, features[each], **where) for each in report_on if each != "val"
    }
    return {**asdict(task), "epoch": epoch, "val": val, **reported}
