"""A small probe of a run's student while it trains; `docs/probe.md`, "During training", says what it measures."""

import copy
from contextlib import nullcontext

import numpy as np
import torch

from fastalign.backbones.vit import ViT
from fastalign.config import Config
from fastalign.evaluation.datasets import LabelledImages, open_labelled
from fastalign.probe.features import probed_backbone, read_features
from fastalign.probe.fit import Recipe, Task, evaluate, fit
from fastalign.probe.heads import make_head
from fastalign.training.distributed import World, on_first_rank
from fastalign.training.run import Run
from fastalign.utils.errors import UserError

IMAGES = {"train": 2_000, "val": 1_000}
"""At most so many of each split, evenly chosen."""
EPOCHS = 3
REPORTED = ("macro_recall", "map", "loss")


def open_splits(config: Config, world: World) -> dict[str, LabelledImages]:
    """The images that `probe.data` is probed with: on rank 0 parts of its train and val splits, elsewhere nothing.

    The test split stays closed: what chooses a checkpoint must not have seen it.

    Raises:
        SharedError: the data cannot be opened; on every rank.
    """
    found = {}

    def opened() -> None:
        for split, most in IMAGES.items():
            try:
                found[split] = _evenly(open_labelled(config.probe.data, split), most)
            except UserError as error:
                raise UserError(f"probe.data: {error}") from error

    if config.probe.data is not None:
        on_first_rank(world, opened)
    return found


def contents(splits: dict[str, LabelledImages]) -> dict[str, str]:
    """What `probe.data` names, as `settings.contents` has it of the other paths."""
    marks = " ".join(f"{split.fingerprint():08x}" for split in splits.values())
    return {"probe.data": marks} if marks else {}


def probe_student(run: Run, splits: dict[str, LabelledImages]) -> dict[str, float]:
    """Teaches a fresh head on the student's tokens and judges it.

    Rank 0 probes alone, since features in memory are one rank's; the others wait. The run is left as it is: what is
    probed is a copy of the encoder (of the averaged weights where there are some), and random states are restored.

    Args:
        run: with a student that is trained.
        splits: of `open_splits`.

    Returns:
        On every rank, of the val split after the last epoch: macro_recall, map and loss.

    Raises:
        SharedError: a bad image or label map; on every rank.
    """
    with nullcontext() if run.world.main else run.hang_timer.paused():
        return on_first_rank(run.world, lambda: _probe(run, splits))


def student_tokens(run: Run) -> ViT:
    """A copy of the student's encoder as `backbone.safetensors` would have it now.

    A copy of a module is not compiled, so that whatever batch it reads, no graph of training is made anew.
    """
    vit = copy.deepcopy(run.objective.student.encoder)
    if run.average:
        average = run.average.state.items()
        vit.load_state_dict(
            {name.removeprefix("encoder."): value for name, value in average if name.startswith("encoder.")}
        )
    return vit


def _probe(run: Run, splits: dict[str, LabelledImages]) -> dict[str, float]:
    device, seed = run.world.device, run.config.seed
    alone = World(rank=0, size=1, device=device)
    where = {"device": device, "dtype": run.dtype}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        vit = student_tokens(run)
        vit.patch_embed.register_forward_hook(lambda *_: run.beat("probing"))
        probed = probed_backbone(vit)
        features = {
            split: read_features(probed, data, alone, threads=run.config.data.threads, dtype=run.dtype)
            for split, data in splits.items()
        }
        task = Task("transformer", "union", skip_blocks=0, seed=seed)
        recipe = Recipe(epochs=EPOCHS, batch_size=min(Recipe.batch_size, len(features["train"])))
        torch.manual_seed(seed)
        head = make_head(task.head, task.labels, probed.shape, features["train"].classes)
        head.register_forward_hook(lambda *_: run.beat("probing"))
        head, _, _ = fit(head, task, features["train"], None, recipe, **where)
        found = evaluate(head, task, features["val"], by_size=False, **where)
    return {name: found[name] for name in REPORTED}


def _evenly(data: LabelledImages, most: int) -> LabelledImages:
    count = len(data)
    return data if count <= most else data.subset(np.arange(most) * count // most)
