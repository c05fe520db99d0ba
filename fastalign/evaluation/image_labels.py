"""The splits of a labelled image folder, and the classes that they share."""

import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastalign.data.sources import Source, open_source
from fastalign.training.distributed import World
from fastalign.utils.errors import UserError
from fastalign.utils.paths import user_path

_NAMED_AT_MOST = 3


@dataclass(frozen=True)
class Split:
    """Images and what they show."""

    source: Source
    labels: Tensor
    "[n] int64, indices into the names of the classes"


def open_splits(
    root: str | Path, world: World, say: Callable[[str], None]
) -> tuple[dict[str, Split], list[str]]:
    """Opens ``train`` and ``val``, and ``test`` where there is one.

    Each is a folder of class folders, images with a ``labels.csv`` (there or in ``images/``), or tar shards with
    ``.cls`` members.

    Args:
        root: the folder of the splits.
        world: every rank opens them, and all must see the same.
        say: told which classes of the training split another one lacks.

    Returns:
        The splits by name, and the names of the classes: those of the training split, sorted (by value where all are
        integers).

    Raises:
        UserError: a split that is missing or has images without a label, a class that the training split lacks, or
            less than two classes.
    """
    root = Path(user_path(root))
    if not root.is_dir():
        raise UserError(f"--data {root}: no such folder; give one that holds train/ and val/")
    for name in ("train", "val"):
        if not (root / name).is_dir():
            raise UserError(f"--data {root} has no folder {name}/; it must hold train/ and val/ (and test/)")
    test = root / "test"
    if os.path.lexists(test) and not test.is_dir():
        raise UserError(f"--data {root}: {test} is no folder; mount what it leads to, or remove it")
    sources = {name: _open(root / name, name) for name in ("train", "val", "test") if (root / name).is_dir()}
    written = {name: _written(source, root / name) for name, source in sources.items()}
    classes = _sorted(set(written["train"]))
    if len(classes) < 2:
        raise UserError(
            f"--data {root}: all images of train/ are of class {classes[0]}; give at least two classes"
        )
    index = {name: number for number, name in enumerate(classes)}
    splits = {}
    for name, source in sources.items():
        _compare(name, written[name], classes, root, say)
        labels = torch.tensor([index[label] for label in written[name]], dtype=torch.int64)
        splits[name] = Split(source, labels)
        if not world.agree(source.fingerprint()) or not world.agree(labels_crc(labels)):
            raise UserError(
                f"--data {root}/{name}: the ranks see different files; give every machine the same"
            )
    return splits, classes


def labels_crc(labels: Tensor) -> int:
    """CRC-32 of [n] int64 labels."""
    return zlib.crc32(labels.numpy().astype(np.int64).tobytes())


def describe(splits: dict[str, Split]) -> dict:
    """What tells one data set from another, by split: images, and CRC-32 of file names and of labels."""
    return {
        name: {
            "images": len(split.source),
            "fingerprint": f"{split.source.fingerprint():08x}",
            "labels": f"{labels_crc(split.labels):08x}",
        }
        for name, split in splits.items()
    }


def _open(path: Path, name: str) -> Source:
    inside = path / "images"
    # A folder that holds other pictures beside the labelled ones, such as a segmentation of each.
    return open_source(str(inside if (inside / "labels.csv").is_file() else path))


def _written(source: Source, path: Path) -> list[str]:
    names = source.class_names()
    missing = [number for number, name in enumerate(names) if name is None]
    if missing:
        raise UserError(
            f"--data {path}: {len(missing)} of {len(names)} images have no label, the first is "
            f"{source.name(missing[0])}; put each into its class folder, in labels.csv, or beside a .cls"
        )
    return names


def _sorted(names: set[str]) -> list[str]:
    numbers = all(name.removeprefix("-").isdecimal() for name in names)
    return sorted(names, key=int) if numbers else sorted(names)


def _compare(split: str, found: list[str], classes: list[str], root: Path, say) -> None:
    strange = _sorted(set(found) - set(classes))
    if strange:
        raise UserError(
            f"--data {root}: {split}/ has {_listed(strange)} that train/ lacks; the two must have the same classes"
        )
    present = set(found)
    absent = [name for name in classes if name not in present]
    if absent:
        say(f"{split}/ has no image of {_listed(absent)}: mean per class is over the other classes")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED_AT_MOST} more" if len(names) > _NAMED_AT_MOST else ""
    word = "class" if len(names) == 1 else "classes"
    return f"{word} {', '.join(names[:_NAMED_AT_MOST])}{more}"
