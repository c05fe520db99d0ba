"""Probes of several backbones with several heads and seeds, shared out among the ranks."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import distributed

from fastalign.engine.distributed import World
from fastalign.probe.datasets import LabelledImages
from fastalign.probe.features import Features, Probed, read_features
from fastalign.probe.fit import Recipe, Task, evaluate, fit
from fastalign.probe.heads import goes_with, make_head


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
    batch_size: int = 64,
    threads: int = 4,
    dtype: torch.dtype = torch.float32,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict]:
    """Trains and judges every head of the plans on every model.

    Args:
        models: by the name that results carry.
        splits: train, val (which chooses the epoch), and what else is judged.
        plans: heads, labels, seeds.
        world: with several ranks, `cache` is needed and the heads are shared out.
        judge: splits that a finished head is judged on, once; `val` always is.
        cache: where features are kept; None = in memory.
        batch_size: images a forward pass of the backbone.
        threads: reading and decoding.
        dtype: of autocast.
        say: gets a line about each step.

    Returns:
        On every rank all rows, as `probe.json` has them.
    """
    rows = []
    for place, (model, probed) in enumerate(models.items()):
        features = {}
        for split, data in splits.items():
            say(f"{model}: reading {len(data.source)} images ({split})")
            features[split] = read_features(
                probed, data, world, folder=cache, batch_size=batch_size, threads=threads, dtype=dtype
            )
        tasks = [(plan, task) for plan in plans for task in plan.tasks(probed)]
        for number, (plan, task) in enumerate(tasks):
            if number % world.size != world.rank:
                continue
            row = _one(task, probed, features, plan, judge, world.device, dtype)
            about = f"{task.labels} {task.head}, {task.skip_blocks} blocks skipped, seed {task.seed}"
            say(f"{model}: {about}: macro recall {row[judge[-1]]['macro_recall']:.4f}")
            rows.append(((place, number), {"model": model, **row}))
    if world.size > 1:
        everybody = [None] * world.size
        distributed.all_gather_object(everybody, rows)
        rows = sorted((row for part in everybody for row in part), key=lambda row: row[0])
    return [row for _, row in rows]


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
    del found["per_class"]
    judged = {split: evaluate(head, task, features[split], **where) for split in judge if split != "val"}
    return {**asdict(task), "epoch": epoch, "val": found, **judged}
