"""Opening labelled data: images with label maps (COCO, ADE20K, a folder, tar shards), and images with classes."""

import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastalign.data.sources import FolderSource, Source, Subset, TarSource, open_source
from fastalign.evaluation.label_maps import LabelledImages, decode_ids, decode_panoptic, pair, read_panoptic
from fastalign.training.distributed import World
from fastalign.utils.errors import UserError, unknown
from fastalign.utils.files import user_path

SPLITS = ("train", "val", "test")
KINDS = ("coco", "coco-things", "coco-panoptic", "ade20k")
HELD_OUT = {"coco": 5_000, "ade20k": 2_000}  # training images in `val`: `test` is the validation split
_MAX_CLASSES = 2**15 - 1
_IDS = "write one class name per line, the first line is id 0"


def open_labelled(data: str, split: str) -> LabelledImages:
    """Open "train", "val" or "test" of KIND:ROOT or of a folder with `classes.txt`; docs/probe.md describes each.

    COCO and ADE20K have two labelled splits: `test` is their validation split, `val` a fixed part of their training
    split, chosen by a hash of the file name, and `train` the rest. UserError: missing or unusable data.
    """
    if split not in SPLITS:
        raise UserError(unknown("split", split, SPLITS))
    data = user_path(data)
    kind, colon, root = data.partition(":")
    if not (colon and re.fullmatch(r"[\w-]+", kind)) or Path(data).exists():
        kind, root = "", data
    elif kind not in KINDS:
        raise UserError(f"{data}: {unknown('data set', kind, KINDS)}; there are {' '.join(KINDS)}")
    root = user_path(root)
    if not root or not Path(root).is_dir():
        raise UserError(f"no such folder: {root or repr(data)}; check the path of the data set")
    return _open_published(kind, Path(root), split) if kind else _open_own(Path(root), split)


def _part(source: Source, split: str, held_out: int) -> np.ndarray:
    """The indices of `train` or `val` in the training split; `val` has the names with the lowest SHA-256."""
    count = len(source)
    if count <= held_out:
        raise UserError(f"{source.root} has {count} images, but val takes {held_out}; download all of it")
    digests = [hashlib.sha256(os.fsencode(source.name(index))).digest() for index in range(count)]
    val = np.sort(sorted(range(count), key=digests.__getitem__)[:held_out])
    return val if split == "val" else np.setdiff1d(np.arange(count), val)


def _open_published(kind: str, root: Path, split: str) -> LabelledImages:
    """COCO or ADE20K, as examples/download.sh leaves them."""
    base = kind.partition("-")[0]
    if kind == "ade20k":
        place, part = root / "ADEChallengeData2016", "validation" if split == "test" else "training"
        folders = place / "images" / part, place / "annotations" / part
    else:
        year = "val2017" if split == "test" else "train2017"
        name = f"panoptic_{year}" if kind == "coco-panoptic" else year
        folders = root / "images" / year, root / "annotations" / name
    panoptic, path = kind == "coco-panoptic", folders[1].with_suffix(".json")
    if missing := [str(each) for each in (*folders, *[path] * panoptic) if not each.exists()]:
        fetch = f"bash examples/download.sh {kind if panoptic else base} {root}"
        raise UserError(f"{missing[0]} is missing; `{fetch}` in a clone of fastalign downloads it")
    images, maps = pair(*(FolderSource(str(folder)) for folder in folders))
    if panoptic:
        classes, segments = read_panoptic(path)
        decode = partial(decode_panoptic, segments=segments, path=path)
    else:
        names = json.loads(Path(__file__).with_name("classes.json").read_text(encoding="utf-8"))
        classes, ids = tuple(names[base]), np.arange(256)  # the index is the id, 0 is "unlabeled"
        if base == "coco":
            classes, ids = classes[: 92 if kind == "coco-things" else 183], (ids + 1) % 256
            ids[(ids >= len(classes)) & (ids < 183)] = 0  # stuff counts as unlabeled
        decode = partial(decode_ids, classes=len(classes), table=ids)
    found = LabelledImages(images, classes, 0, maps, decode)
    return found if split == "test" else found.subset(_part(images, split, HELD_OUT[base]))


def _open_own(root: Path, split: str) -> LabelledImages:
    """A folder of folders or of tar shards, with classes.txt."""
    shards, folder = sorted(str(path.absolute()) for path in root.glob(f"{split}-*.tar")), root / split
    if bool(shards) == folder.is_dir():
        found, word = ("both", "and") if shards else ("neither", "nor")
        raise UserError(
            f"{root} has {found} {split}/ {word} {split}-*.tar: give one, or name a kind (coco:ROOT)"
        )
    classes, unlabeled = _read_classes(root / "classes.txt")
    if shards:
        members = TarSource(shards)
        is_map = np.array([members.name(index).lower().endswith(".png") for index in range(len(members))])
        sources = (Subset(members, np.flatnonzero(chosen)) for chosen in (~is_map, is_map))
    else:
        sources = (FolderSource(str(folder / name)) for name in ("images", "labels"))
    images, maps = pair(*sources)
    return LabelledImages(images, classes, unlabeled, maps, partial(decode_ids, classes=len(classes)))


def _read_classes(path: Path) -> tuple[tuple[str, ...], int | None]:
    """The names in classes.txt and the id of `unlabeled`, None if it is not listed."""
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except (FileNotFoundError, UnicodeDecodeError) as error:
        reason = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else "is missing"
        raise UserError(f"{path} {reason}; {_IDS}") from error
    if not 0 < len(names) <= _MAX_CLASSES:
        raise UserError(f"{path} has {len(names)} lines, not 1 to {_MAX_CLASSES}; {_IDS}")
    ids: dict[str, int] = {}
    for number, name in enumerate(names):
        if not name or ids.setdefault(name, number) != number:
            raise UserError(f"{path} line {number + 1} is empty or occurs before: {name!r}; {_IDS}")
    return tuple(names), ids.get("unlabeled")


@dataclass(frozen=True)
class ImageSplit:
    """Images and their classes, as int64 indices [n] into the class names."""

    source: Source
    labels: Tensor

    def facts(self) -> dict:
        """The number of images, and CRC-32 of file names and labels."""
        crc = {"fingerprint": self.source.crc_of_names(), "labels": zlib.crc32(self.labels.numpy().tobytes())}
        return {"images": len(self.source), **{name: f"{value:08x}" for name, value in crc.items()}}


def open_image_splits(
    root: str | Path, world: World, say: Callable[[str], None]
) -> tuple[dict[str, ImageSplit], list[str]]:
    """The splits `train`, `val` and, if it exists, `test`, and the sorted class names, those of train.

    Each split is a folder of class folders, images with a `labels.csv` (there or in `images/`), or tar shards with
    `.cls` members. UserError: they do not fit together, or the ranks see different files.
    """
    root, opened, splits = Path(user_path(root)), {}, {}
    for name in SPLITS:
        if (root / name).is_dir():
            opened[name] = _open_classes(root / name)
        elif name != "test" or os.path.lexists(root / name):  # such as a link whose target is not mounted
            raise UserError(f"--data {root} has no folder {name}/; it must contain train/ and val/")
    classes = sorted(set(opened["train"][1]))
    if all(name.removeprefix("-").isdecimal() for name in classes):
        classes.sort(key=int)
    if len(classes) < 2:
        raise UserError(f"--data {root}: train/ has only the class {classes[0]}; give at least two classes")
    index = {name: number for number, name in enumerate(classes)}
    for name, (source, names) in opened.items():
        if extra := sorted(set(names) - set(classes)):
            about = f"{name}/ has {len(extra)} classes that train/ lacks, such as {extra[0]}"
            raise UserError(f"--data {root}: {about}; add them to train/, or remove them")
        if absent := sorted(set(classes) - set(names)):
            about = f"{name}/ has no image of {len(absent)} classes, such as {absent[0]}"
            say(f"{about}: mean per class is over the others")
        splits[name] = ImageSplit(source, torch.tensor([index[label] for label in names]))
        if not world.agree(str(splits[name].facts())):
            raise UserError(f"--data {root}/{name}: the ranks see different files")
    return splits, classes


def _open_classes(path: Path) -> tuple[Source, list[str]]:
    """A split and the class name of each image."""
    inside = path / "images"
    # The folder may have other pictures, such as label maps, next to `images/`.
    source = open_source(str(inside if (inside / "labels.csv").is_file() else path))
    names = source.class_names()
    if missing := [number for number, name in enumerate(names) if name is None]:
        raise UserError(
            f"--data {path}: {len(missing)} of {len(names)} images have no label, the first is "
            f"{source.name(missing[0])}; add its class folder, its line in labels.csv, or its .cls file"
        )
    return source, names
