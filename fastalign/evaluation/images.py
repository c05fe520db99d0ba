"""Image classification: from a backbone and a labelled image folder to `classify.json`."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from fastalign import __version__
from fastalign.backbones.vit import ViT
from fastalign.evaluation.datasets import open_image_splits
from fastalign.evaluation.image_training import Job, train_on_features, train_on_images
from fastalign.evaluation.metrics import IMAGE_METRICS
from fastalign.evaluation.options import ImageOptions
from fastalign.evaluation.results import check_output, write_results
from fastalign.training.checkpoint_files import checksum
from fastalign.training.command import report_rank_error
from fastalign.training.distributed import World
from fastalign.training.metrics import mean_and_spread
from fastalign.utils.errors import UserError
from fastalign.utils.files import can_be_folder

RESULTS = "classify.json"


def classify(
    backbone: ViT,
    data: str | Path,
    *,
    output: str | Path | None = None,
    world: World | None = None,
    say: Callable[[str], None] = lambda text: None,
    command: str | None = None,
    **options,
) -> dict:
    """Trains classifiers on a backbone, one for each seed, and evaluates them; returns the content of classify.json.

    Args:
        backbone: it is copied and stays unchanged.
        data: a folder with ``train`` and ``val``, and perhaps ``test``: class folders, images with ``labels.csv``,
            or tar shards with ``.cls`` members.
        output: the folder for classify.json, checkpoints and features; None = nothing is written, features are in
            memory, nothing can be resumed.
        world: the ranks that share the work, with an output; None = this process alone.
        say: gets lines about the progress.
        command: kept in the result.
        **options: fields of `fastalign.evaluation.options.ImageOptions`: head, seeds, unfreeze, epochs, lr...

    Raises:
        UserError: bad data or options; the message names the command's flag.
    """
    chosen = ImageOptions(**options).resolved()
    if world is None:
        gpu = torch.cuda.is_available()
        world = World(0, 1, torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu"))
    if backbone.spec.channels != 3:
        raise UserError(f"--kwargs in_chans={backbone.spec.channels}: images have 3 channels; remove it")
    splits, classes = open_image_splits(data, world, say)
    size, parts = chosen.batch_size, chosen.accumulate * world.size if chosen.live else 1
    if size % parts:
        raise UserError(f"--batch-size {size} must be a multiple of --accumulate x ranks = {parts}")
    if size > (images := len(splits["train"].source)):
        raise UserError(f"--batch-size {size} is more than the {images} images of train/: lower it")
    described = {name: split.facts() for name, split in splits.items()}
    about = {"root": str(data), "splits": described, "classes": classes}
    facts = {"command": command, **_facts(backbone, chosen, about)}
    folder = Path(output) if output else None
    if folder:
        can_be_folder(f"--output {folder}", folder)
        check_output(folder / RESULTS, facts)
    identity = {key: facts[key] for key in ("settings", "backbone")} | {
        "data": described,
        "ranks": world.size,
    }
    job = Job(backbone, splits, len(classes), chosen, world, say, folder, identity)
    with report_rank_error(world.rank):
        results = (train_on_images if chosen.live else train_on_features)(job)
    facts |= _outcome(results, facts["reported"], world)
    if folder and world.main:
        write_results(folder / RESULTS, facts)
    world.barrier()
    return facts


def _facts(vit: ViT, options: ImageOptions, data: dict) -> dict:
    """The part of the results that is known before training."""
    reads = "the class token" if vit.spec.class_token else "the mean of the patches"
    reported, selection = "val", "none, the last epoch: there is no test split to report a chosen one on"
    if "test" in data["splits"]:
        reported, selection = "test", "the epoch with the best validation top-1, the first of equals"
    recipe = {"name": None, "kwargs": {}}
    with suppress(UserError):  # a user's own timm model may have no name
        recipe = vit.recipe
    return {
        "settings": options.model_dump(exclude={"threads", "seeds"}),
        "backbone": {
            **recipe,
            "softcap": vit.softcap,
            "weights": f"{checksum(vit):08x}",
            "reads": reads if options.head == "linear" else "all tokens",
        },
        "data": data,
        "reported": reported,
        "selection": selection,
    }


def _outcome(results: list[dict], split: str, world: World) -> dict:
    """The results of all seeds, with mean and sample standard deviation, and what they were computed on."""
    values = {name: [result[split][name] for result in results] for name in IMAGE_METRICS}
    found = {name: {} if None in of_seeds else mean_and_spread(of_seeds) for name, of_seeds in values.items()}
    over_seeds = {key: {name: each.get(key) for name, each in found.items()} for key in ("mean", "std")}
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    versions = {"fastalign": __version__, "torch": torch.__version__, "device": device}
    return {**over_seeds, "seeds": results, "ranks": world.size, "versions": versions}
