"""Labelled image folders: the splits, and the classes that they share."""

import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastalign.data.sources import Source, open_source
from fastalign.training.distributed import World
from fastalign.utils.errors import UserError
from fastalign.utils.paths import user_path


@dataclass(frozen=True)
class ImageSplit:
    """Images and their classes, as int64 indices [n] into the class names."""

    source: Source
    labels: Tensor

    def facts(self) -> dict:
        """The number of images, and CRC-32 of file names and labels."""
        crc = {"fingerprint": self.source.fingerprint(), "labels": zlib.crc32(self.labels.numpy().tobytes())}
        return {"images": len(self.source), **{name: f"{value:08x}" for name, value in crc.items()}}


def open_image_splits(
    root: str | Path, world: World, say: Callable[[str], None]
) -> tuple[dict[str, ImageSplit], list[str]]:
    """Opens ``train`` and ``val``, and ``test`` where there is one; UserError where they do not fit together.

    Each is a folder of class folders, images with a ``labels.csv`` (there or in ``images/``), or tar shards with
    ``.cls`` members. Every rank opens them, and all must see the same files.

    Returns:
        The splits by name, and the class names: those of train, sorted (as numbers where all are integers).
    """
    root, opened = Path(user_path(root)), {}
    for name in ("train", "val", "test"):
        if (root / name).is_dir():
            opened[name] = _open(root / name)
        elif name != "test" or os.path.lexists(root / name):  # such as a link whose target is not mounted
            raise UserError(f"--data {root} has no folder {name}/; it must contain train/ and val/")
    classes = _sorted(set(opened["train"][1]))
    if len(classes) < 2:
        raise UserError(f"--data {root}: train/ has the class {classes[0]} only; give at least two classes")
    index, splits = {name: number for number, name in enumerate(classes)}, {}
    for name, (source, names) in opened.items():
        present = set(names)
        unknown = _sorted(present - set(classes))
        if unknown:
            raise UserError(
                f"--data {root}: {name}/ has {_listed(unknown)} that train/ lacks; make them agree"
            )
        absent = [label for label in classes if label not in present]
        if absent:
            say(f"{name}/ has no image of {_listed(absent)}: mean per class is over the other classes")
        splits[name] = ImageSplit(source, torch.tensor([index[label] for label in names]))
        if not world.agree(str(splits[name].facts())):
            raise UserError(f"--data {root}/{name}: the ranks see different files")
    return splits, classes


def _open(path: Path) -> tuple[Source, list[str]]:
    """A split and the class name of each image."""
    inside = path / "images"
    # A folder that has other pictures next to the labelled ones, such as label maps.
    source = open_source(str(inside if (inside / "labels.csv").is_file() else path))
    names = source.class_names()
    missing = [number for number, name in enumerate(names) if name is None]
    if missing:
        raise UserError(
            f"--data {path}: {len(missing)} of {len(names)} images have no label, the first is "
            f"{source.name(missing[0])}; add its class folder, its line in labels.csv, or its .cls file"
        )
    return source, names


def _sorted(names: set[str]) -> list[str]:
    integers = all(name.removeprefix("-").isdecimal() for name in names)
    return sorted(names, key=int) if integers else sorted(names)


def _listed(names: list[str]) -> str:
    return f"{'class' if len(names) == 1 else 'classes'} {', '.join(names[:3])}{', ...' if names[3:] else ''}"
