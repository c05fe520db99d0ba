"""Image classification: from a backbone and a labelled image folder to `classify.json`."""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
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
        output: the folder for classify.json and checkpoints; None = nothing is written, nothing can be resumed.
        world: the ranks that share the work; None = this process alone.
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
    with ExitStack() as stack:
        splits, classes = open_image_splits(data, world, say)
        _check_batch_size(chosen, len(splits["train"].source), world)
        described = {name: split.facts() for name, split in splits.items()}
        about = {"root": str(data), "splits": described, "classes": classes}
        facts = _facts(backbone, chosen, command, about)
        folder = Path(output or world.share(stack.enter_context(tempfile.TemporaryDirectory())))
        can_be_folder(f"--output {folder}", folder)
        identity = _identity(facts)
        # Figures of the same settings on older weights are out of date and may be replaced.
        check_output(
            folder / RESULTS, lambda old: _identity(old) | {"backbone": identity["backbone"]}, identity
        )
        folder.mkdir(parents=True, exist_ok=True)
        shared = identity | {"ranks": world.size} if output else None
        job = Job(backbone, splits, len(classes), chosen, world, say, folder, shared)
        with report_rank_error(world.rank):
            results = (train_on_images if chosen.live else train_on_features)(job)
    facts |= _outcome(results, facts["reported"], world)
    if output and world.main:
        write_results(folder / RESULTS, facts)
    world.barrier()
    return facts


def _check_batch_size(options: ImageOptions, images: int, world: World) -> None:
    size, parts = options.batch_size, options.accumulate * world.size if options.live else 1
    if size % parts:
        raise UserError(f"--batch-size {size} must be a multiple of --accumulate x ranks = {parts}")
    if size > images:
        raise UserError(f"--batch-size {size} is more than the {images} images of train/: lower it")


def _facts(vit: ViT, options: ImageOptions, command: str | None, data: dict) -> dict:
    """The part of the results that is known before training."""
    reads = "the class token" if vit.spec.class_token else "the mean of the patches"
    recipe = getattr(vit, "recipe", {"name": None, "kwargs": {}})
    reported, selection = "val", "none, the last epoch: there is no test split to report a chosen one on"
    if "test" in data["splits"]:
        reported, selection = "test", "the epoch with the best validation top-1, the first of equals"
    return {
        "command": command,
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


def _identity(facts: dict) -> dict:
    """What results and checkpoints must share to continue one another."""
    return {**{key: facts[key] for key in ("settings", "backbone")}, "data": facts["data"]["splits"]}


def _outcome(results: list[dict], split: str, world: World) -> dict:
    """The results of all seeds, with mean and sample standard deviation, and what they were computed on."""
    values = {name: [result[split][name] for result in results] for name in IMAGE_METRICS}
    found = {name: {} if None in of_seeds else mean_and_spread(of_seeds) for name, of_seeds in values.items()}
    over_seeds = {key: {name: each.get(key) for name, each in found.items()} for key in ("mean", "std")}
    versions = {
        "fastalign": __version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU",
    }
    return {**over_seeds, "seeds": results, "ranks": world.size, "versions": versions}
