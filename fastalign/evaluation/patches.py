"""Probes of several backbones with several heads and seeds, shared out among the ranks."""

import contextlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from fastalign.evaluation.cache import Files, check_room
from fastalign.evaluation.datasets import LabelledImages
from fastalign.evaluation.features import Features, Probed, feature_files, read_features
from fastalign.evaluation.fit import Recipe, Task, check_options, evaluate, fit
from fastalign.evaluation.heads import HEADS, LABELS, goes_with, make_head
from fastalign.training.command import report_rank_error
from fastalign.training.distributed import World
from fastalign.utils.errors import UserError


@dataclass(frozen=True)
class Plan:
    """What is asked of each backbone."""

    heads: tuple[str, ...] = ("transformer",)
    labels: tuple[str, ...] = ("union",)
    seeds: tuple[int, ...] = (0,)
    recipe: Recipe = field(default_factory=Recipe)
    hidden: int = 1024
    """width of the MLP head"""
    layers: int = 2
    """blocks of the transformer heads"""

    def __post_init__(self):
        checks = [
            ("seeds", all(0 <= seed < 2**63 for seed in self.seeds), "integers from 0 on"),
            ("hidden", self.hidden >= 1, "at least 1"),
            ("layers", self.layers >= 1, "at least 1"),
        ]
        for head in self.heads:
            fits = [name for name in LABELS if goes_with(head, name)]
            right = any(name in fits for name in self.labels)
            checks.append(("labels", right, f"one of {' '.join(fits)} for --heads {head}"))
        for name in self.labels:
            fits = [head for head in HEADS if goes_with(head, name)]
            right = any(head in fits for head in self.heads)
            checks.append(("heads", right, f"one of {' '.join(fits)} for --labels {name}"))
        check_options(self, checks)

    def tasks(self, probed: Probed) -> list[Task]:
        """Every combination that makes sense."""
        every = itertools.product(probed.sets, self.labels, self.heads, self.seeds)
        return [
            Task(head, labels, skip, seed) for skip, labels, head, seed in every if goes_with(head, labels)
        ]


def probe(
    models: dict[str, Probed],
    splits: dict[str, LabelledImages],
    plans: Sequence[Plan],
    world: World,
    *,
    judge: Sequence[str] = ("test",),
    cache: Path | None = None,
    keep_features: bool = True,
    batch_size: int = 64,
    threads: int = 4,
    dtype: torch.dtype = torch.float32,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict]:
    """Trains and judges every head of the plans on every model.

    Args:
        models: by the name that results carry.
        splits: train, val (which chooses the epoch), and what else is judged.
        plans: heads, labels, seeds, recipe.
        world: with several ranks, `cache` is needed and the heads are shared out.
        judge: splits that a finished head is judged on, once; `val` always is.
        cache: where features are kept; None = in memory.
        keep_features: leave in `cache` at the end what was not there at the beginning.
        batch_size: images a forward pass of the backbone.
        threads: reading and decoding.
        dtype: of autocast.
        say: gets a line about each step.

    Returns:
        On every rank all rows, as `probe.json` has them.

    Raises:
        UserError: a batch larger than the training split, a split without a class, too little room, or what reading
            and training refuse.
    """
    for plan in plans:
        plan.recipe.check_images(len(splits["train"]))
    read, fresh = _read(
        models, splits, world, folder=cache, batch_size=batch_size, threads=threads, dtype=dtype, say=say
    )
    # Heads of all models are shared out together, so that ranks wait for each other only once, at the end.
    tasks = [(model, plan, task) for model in models for plan in plans for task in plan.tasks(models[model])]
    rows = {}
    for number in range(world.rank, len(tasks), world.size):
        model, plan, task = tasks[number]
        features = {split: read[model, split] for split in splits}
        with report_rank_error(world.rank):
            row = _one(task, models[model], features, plan, judge, world.device, dtype)
        about = f"{task.labels} {task.head}, {task.skip_blocks} blocks skipped, seed {task.seed}"
        say(f"{model}: {about}: macro recall {row[judge[-1]]['macro_recall']:.4f}")
        rows[number] = {"model": model, **row}
    for part in world.gather(rows):
        rows |= part
    if fresh and world.main and not keep_features:
        for made in fresh:
            made.remove()
        with contextlib.suppress(OSError):
            cache.rmdir()  # unless it holds something else
    return [rows[number] for number in range(len(tasks))]


def _read(
    models: dict[str, Probed],
    splits: dict[str, LabelledImages],
    world: World,
    *,
    folder: Path | None,
    dtype: torch.dtype,
    say: Callable[[str], None],
    **how,
) -> tuple[dict[tuple[str, str], Features], list[Files]]:
    """Features by model and split, and the files that were not there before."""
    files = {}
    if folder is not None:
        every = itertools.product(models, splits)
        files = {key: feature_files(models[key[0]], splits[key[1]], folder, dtype) for key in every}
    fresh = [made for made in files.values() if not made.complete()]
    if world.main and fresh:
        check_room(folder, fresh)
    read = {}
    for (model, probed), (split, data) in itertools.product(models.items(), splits.items()):
        known = folder is not None and files[model, split].complete()
        if world.main:
            say(f"{model}: {len(data)} images ({split}){', read before' if known else ''}")
        read[model, split] = read_features(probed, data, world, folder=folder, dtype=dtype, **how)
        if not read[model, split].whole.any():
            raise UserError(
                f"the {split} split has no pixel of any class, all are void: check its label maps"
            )
    return read, fresh


def _one(
    task: Task,
    probed: Probed,
    features: dict[str, Features],
    plan: Plan,
    judge: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
) -> dict:
    torch.manual_seed(task.seed)
    classes = features["train"].classes
    head = make_head(task.head, task.labels, probed.shape, classes, hidden=plan.hidden, layers=plan.layers)
    where = {"device": device, "dtype": dtype}
    head, epoch, found = fit(head, task, features["train"], features["val"], plan.recipe, **where)
    if not math.isfinite(found["loss"]):
        about = f"{task.labels} {task.head}, seed {task.seed}"
        raise UserError(f"--lr: the loss of {about} is {found['loss']}; lower the rate")
    del found["per_class"]
    judged = {split: evaluate(head, task, features[split], **where) for split in judge if split != "val"}
    return {**asdict(task), "epoch": epoch, "val": found, **judged}
