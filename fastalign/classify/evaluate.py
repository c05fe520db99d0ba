"""From a backbone and a labelled image folder to figures."""

import json
import platform
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from fastalign import __version__
from fastalign.backbones.vit import ViT
from fastalign.classify.fit import difference
from fastalign.classify.heads import reads
from fastalign.classify.labels import Split, describe, open_splits
from fastalign.classify.modes import Job, check_batch, train_on_features, train_on_images
from fastalign.classify.options import Options
from fastalign.classify.scores import summarise
from fastalign.training.checkpoint_files import checksum
from fastalign.training.command import report_rank_error
from fastalign.training.distributed import World
from fastalign.utils.errors import UserError
from fastalign.utils.files import can_be_folder, write_atomically

REPORT = "classify.json"


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
    """Train classifiers on a backbone, one a seed, and say how good they are.

    Args:
        backbone: any of ours; it is copied, and stays as it is.
        data: a folder with ``train`` and ``val``, and perhaps ``test``: class folders, images with ``labels.csv``,
            or tar shards with ``.cls`` members.
        output: the folder for classify.json, checkpoints, and features that memory has no room for; None = nothing
            is kept, and nothing can be resumed.
        world: the ranks that share the work; None = this process alone.
        say: told what is going on.
        command: kept in the result, for whoever wants to repeat it.
        **options: fields of `fastalign.classify.options.Options`: head, seeds, unfreeze, epochs, lr...

    Returns:
        What classify.json says (docs/classify.md).

    Raises:
        UserError: bad data or options; the message names the command's flag.
        TypeError: an option that there is not.
    """
    chosen = Options(**options).resolved()
    world = world or alone()
    if backbone.spec.channels != 3:
        raise UserError(f"--kwargs in_chans={backbone.spec.channels}: images come with 3 channels; remove it")
    with ExitStack() as stack:
        splits, classes = open_splits(data, world, say)
        for split in splits.values():
            stack.callback(split.source.close)
        check_batch(chosen, len(splits["train"].source), world)
        report = _begin(backbone, data, splits, classes, chosen, command)
        folder = Path(output or world.gather(stack.enter_context(tempfile.TemporaryDirectory()))[0])
        can_be_folder(f"--output {folder}", folder)
        _same_settings(folder / REPORT, report)
        folder.mkdir(parents=True, exist_ok=True)
        identity = _identity(report) | {"ranks": world.size} if output else None
        job = Job(backbone, splits, len(classes), chosen, world, say, folder, identity)
        with report_rank_error(world.rank):
            results = (train_on_images if chosen.live else train_on_features)(job)
    mean, std = summarise(results, report["reported"])
    report |= {"mean": mean, "std": std, "seeds": results, "ranks": world.size, "versions": _versions(world)}
    if output and world.main:
        text = json.dumps(report, indent=2) + "\n"
        write_atomically(folder / REPORT, lambda file: file.write(text.encode()))
    world.barrier()
    return report


def alone() -> World:
    """This process without others, on the GPU where there is one."""
    return World(
        0,
        1,
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu"),
    )


def _begin(
    vit: ViT,
    data: str | Path,
    splits: dict[str, Split],
    classes: list[str],
    options: Options,
    command: str | None,
) -> dict:
    """What of the report is known before any training."""
    recipe = getattr(vit, "recipe", {"name": None, "kwargs": {}})
    facts = {"softcap": vit.softcap, "weights": f"{checksum(vit):08x}", "reads": reads(vit, options.head)}
    reported, selection = "val", "none, the last epoch: there is no test split to report a chosen one on"
    if "test" in splits:
        reported, selection = "test", "the epoch with the best validation top-1, the first of equals"
    return {
        "command": command,
        "settings": options.settings(),
        "backbone": {**recipe, **facts},
        "data": {"root": str(data), "splits": describe(splits), "classes": classes},
        "reported": reported,
        "selection": selection,
    }


def _identity(report: dict) -> dict:
    """What a checkpoint must share."""
    return {
        "settings": report["settings"],
        "backbone": report["backbone"],
        "data": report["data"]["splits"],
    }


def _same_settings(path: Path, report: dict) -> None:
    """Refuse to replace the figures of other settings or data; those of older weights are out of date."""
    try:
        old = _identity(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        return  # none, or none that anybody could read
    new = _identity(json.loads(json.dumps(report)))
    old["backbone"] = new["backbone"]
    if old != new:
        raise UserError(
            f"{path} has the figures of {difference(old, new)}: remove it, or choose another --output"
        )


def _versions(world: World) -> dict[str, str]:
    cuda = world.device.type == "cuda"
    return {
        "fastalign": __version__,
        "torch": torch.__version__,
        "timm": version("timm"),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(world.device) if cuda else "CPU",
    }
