"""A small probe of the student while it trains; docs/probe.md, "During training", describes it."""

import copy

import numpy as np
import torch
from torch import Tensor

from fastalign.backbones.vit import ViT
from fastalign.config import Config
from fastalign.evaluation.datasets import open_labelled
from fastalign.evaluation.features import frozen_encoder, read_patch_features
from fastalign.evaluation.fit import Track
from fastalign.evaluation.heads import make_patch_head
from fastalign.evaluation.label_maps import LabelledImages
from fastalign.evaluation.options import Recipe
from fastalign.evaluation.patches import Task, evaluate_head, fit_head
from fastalign.training.distributed import World, on_first_rank
from fastalign.utils.errors import UserError

IMAGES = {"train": 2_000, "val": 1_000}
"""At most so many of each split, evenly chosen."""
EPOCHS = 3
REPORTED = ("macro_recall", "map", "loss")


def open_splits(config: Config, world: World) -> dict[str, LabelledImages]:
    """Parts of the train and val splits of `probe.data` on rank 0, nothing elsewhere; `test` is not opened."""
    found = {}

    def open_parts() -> None:
        for split, most in IMAGES.items():
            try:
                data = open_labelled(config.probe.data, split)
            except UserError as error:
                raise UserError(f"probe.data: {error}") from error
            found[split] = data.subset(np.arange(most) * len(data) // most) if len(data) > most else data

    if config.probe.data is not None:
        on_first_rank(world, open_parts)
    return found


def contents(splits: dict[str, LabelledImages]) -> dict[str, str]:
    """What identifies the images of `probe.data` to a run that resumes."""
    marks = " ".join(f"{split.fingerprint():08x}" for split in splits.values())
    return {"probe.data": marks} if marks else {}


def probe_encoder(
    encoder: ViT,
    splits: dict[str, LabelledImages],
    world: World,
    *,
    average: dict[str, Tensor] | None,
    dtype: torch.dtype,
    threads: int,
    seed: int,
    track: Track,
) -> dict[str, float]:
    """Trains a head on an encoder's frozen tokens on rank 0, in memory, and evaluates its last epoch on val.

    `average`: averaged weights of the student, used instead of the encoder's.
    """
    device = world.device

    def probe() -> dict[str, float]:
        vit = copy.deepcopy(encoder)  # a copy is not compiled, so no graph of training is compiled again
        if average is not None:
            vit.load_state_dict({name: average[f"encoder.{name}"] for name in vit.state_dict()})
        tokens, where = frozen_encoder(vit), {"dtype": dtype, "track": track}
        alone = World(0, 1, device)
        read = {
            name: read_patch_features(tokens, split, alone, threads=threads, **where)
            for name, split in splits.items()
        }
        where["device"] = device
        task = Task("transformer", "union", skip_blocks=0, seed=seed)
        recipe = Recipe(epochs=EPOCHS, batch_size=min(Recipe().batch_size, len(read["train"])))
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(task.seed)
            head = make_patch_head(task.head, task.labels, tokens.shape, read["train"].classes)
            fit_head(head, task, read["train"], None, recipe, **where)
        scores = evaluate_head(head, task, read["val"], **where)
        return {name: scores[name] for name in REPORTED}

    return on_first_rank(world, probe)
