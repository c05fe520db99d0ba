"""Label maps: decoding PNGs to class ids, pairing them with images, and the labels of patches."""

import io
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from fastalign.data.headers import read_size
from fastalign.data.index import stem
from fastalign.data.sources import Source, Subset, Unreadable
from fastalign.utils.errors import UserError, first_line

VOID = -1  # the id of pixels that belong to no class

# Bits of a PNG by PIL's mode; PIL scales grey values of fewer than 8 bits.
_ID_BITS = {"L": (8,), "P": (1, 2, 4, 8)}
_DEEP_ID_BITS = _ID_BITS | {"I;16": (16,), "I": (16,)}


def _read_png(encoded: np.ndarray, name: str, bits: dict[str, tuple[int, ...]]) -> np.ndarray:
    """The pixel values of a PNG that has one of the modes and numbers of bits."""
    if encoded[:8].tobytes() != b"\x89PNG\r\n\x1a\n":
        raise UserError(f"label map {name} is not a PNG; a label map is a PNG of class ids")
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            pixels, mode, depth = np.asarray(image), image.mode, encoded[24]
    except Exception as error:  # the decoder raises a dozen classes for damaged files
        raise UserError(f"cannot decode label map {name}: {first_line(error)}; replace it") from error
    if depth not in bits.get(mode, ()):
        wanted = " or ".join(f"{mode} of {'/'.join(map(str, depths))}" for mode, depths in bits.items())
        raise UserError(f"label map {name} has mode {mode}, {depth} bits, not {wanted} bits; convert it")
    return pixels


def decode_ids(
    encoded: np.ndarray, name: str, _stem: str, *, classes: int, table: np.ndarray | None = None
) -> np.ndarray:
    """A map, grey or palette, whose pixels are class ids; the largest value (255, or 65535 with 16 bits) is VOID.

    With `table`, [256], the map has 8 bits and the ids are looked up there. UserError for an id of `classes` or more.
    """
    pixels = _read_png(encoded, name, _DEEP_ID_BITS if table is None else _ID_BITS).astype(np.int32)
    void = 65535 if encoded[24] == 16 else 255
    ids = np.where(pixels == void, VOID, pixels) if table is None else table[pixels]
    unknown = ids >= classes
    if unknown.any():
        raise UserError(
            f"label map {name} has the id {pixels[unknown].max()}, but there are {classes} classes; "
            "correct the map (or download it again), or add the missing lines to classes.txt"
        )
    return ids.astype(np.int16)


@lru_cache(maxsize=2)  # train and val are parts of one file, which takes seconds
def read_panoptic(path: Path) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """Read `panoptic_*2017.json`: class names (0 is "unlabeled", then by category id), and the segments of each map.

    Segments by the map's name without suffix: [n, 2], ids in ascending order from 0 (unlabeled), and their classes.
    """
    try:
        content = json.loads(path.read_bytes())
        categories = sorted((int(entry["id"]), str(entry["name"])) for entry in content["categories"])
        of_category = {number: index for index, (number, _) in enumerate(categories, start=1)}
        segments = {}
        for entry in content["annotations"]:
            pairs = ((int(each["id"]), of_category[each["category_id"]]) for each in entry["segments_info"])
            segments[str(entry["file_name"]).rpartition(".")[0]] = np.array([(0, 0), *sorted(pairs)])
        return ("unlabeled", *(name for _, name in categories)), segments
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a panoptic JSON: {error!r}; download it again") from error


def decode_panoptic(
    encoded: np.ndarray, name: str, stem: str, *, segments: dict[str, np.ndarray], path: Path
) -> np.ndarray:
    """A panoptic map: a pixel's segment is R + 256 G + 65536 B; `segments` are those of the JSON file `path`."""
    pixels = _read_png(encoded, name, {"RGB": (8,)}) @ np.array([1, 256, 65536])
    if stem not in segments:
        raise UserError(f"{path} lacks the label map {name}; download it again")
    ids, classes = segments[stem].T
    position = np.searchsorted(ids, pixels).clip(max=len(ids) - 1)
    unknown = ids[position] != pixels
    if unknown.any():
        raise UserError(f"label map {name} has the segment {pixels[unknown][0]}, not in {path}")
    return classes[position].astype(np.int16)


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """One split: image i belongs to label map i. Safe to use from several threads."""

    source: Source  # encoded images, for `fastalign.data.Loader`
    classes: tuple[str, ...]  # names; the index is the class id
    unlabeled: int | None  # the class that means "unlabeled"
    maps: Source  # encoded label maps
    decode: Callable[[np.ndarray, str, str], np.ndarray]
    """(encoded map, file for messages, name within `maps` without the suffix) -> [H, W] int16"""

    def __len__(self) -> int:
        return len(self.source)

    def label_map(self, index: int) -> np.ndarray:
        """The class of every pixel, [H, W] int16, ids 0..C-1 and VOID; UserError for a bad map."""
        file, image = self.maps.location(index), self.source.location(index)
        labels = self.decode(self.maps.read(index), file, stem(self.maps.name(index)))
        size = read_size(self.source.read(index))
        if isinstance(size, str):
            raise Unreadable(image, size)
        if labels.shape != size:
            height, width = labels.shape
            found = f"label map {file} has {width} x {height} pixels"
            raise UserError(f"{found}, its image {image} {size[1]} x {size[0]}")
        return labels

    def subset(self, indices: np.ndarray) -> "LabelledImages":
        """The images with these indices and their maps: [n] integers, n >= 1, in that order."""
        return replace(self, source=Subset(self.source, indices), maps=Subset(self.maps, indices))

    def fingerprint(self) -> int:
        """CRC-32 of all file names, the bytes of a few files, and the classes; independent of the location."""
        crc = zlib.crc32(json.dumps([self.classes, self.unlabeled]).encode())
        for source in (self.source, self.maps):
            names = "\0".join(source.name(i) for i in range(len(source)))
            crc = zlib.crc32(names.encode("utf-8", "surrogateescape"), crc)
            # Names alone would not distinguish two renderings with numbered files.
            for i in sorted({i * (len(source) - 1) // 8 for i in range(9)}):
                crc = zlib.crc32(source.read(i), crc)
        return crc


def pair(images: Source, maps: Source) -> tuple[Source, Source]:
    """The images, and the label maps in their order, matched by name without suffix; UserError: one is missing."""
    by_image, by_map = {}, {}
    for source, places in ((images, by_image), (maps, by_map)):
        for index in range(len(source)):
            if (other := places.setdefault(stem(source.name(index)), index)) != index:
                both = f"{source.location(other)} and {source.location(index)}"
                raise UserError(f"two files of one name: {both}; remove one")
    for source, places, others, text in (
        (images, by_image, by_map, "images have no label map"),
        (maps, by_map, by_image, "label maps have no image"),
    ):
        if unmatched := [index for name, index in places.items() if name not in others]:
            raise UserError(
                f"{len(unmatched)} of {len(source)} {text}, first {source.location(unmatched[0])}; "
                "an image and its map have the same name (in shards, in the same one), the map with .png"
            )
    return images, Subset(maps, np.array([by_map[name] for name in by_image]))


def crop_and_resize(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[H, W] -> [h, w]: the largest centre crop of the shape of `size`, resized to it by nearest neighbour."""
    scale = min(have / want for have, want in zip(labels.shape, size, strict=True))
    picked = []
    for have, want in zip(labels.shape, size, strict=True):
        side = min(have, round(want * scale))
        # The input pixel under the centre of each output pixel, as PIL's NEAREST.
        picked.append((have - side) // 2 + ((np.arange(want) + 0.5) * (side / want)).astype(np.int64))
    return labels[np.ix_(*picked)]


def patch_labels(
    labels: np.ndarray,
    *,
    size: tuple[int, int],  # of the backbone's input, (h, w) pixels; a remainder is ignored
    patch: tuple[int, int],  # of a patch, (h, w) pixels
    classes: int,
    unlabeled: int | None = None,  # the class that means "no label": a patch has it only if it has no other
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The labels of an image from those of its pixels, [H, W] integers, as in Covert et al. (2025), section 4.

    Returns:
        union: [N, C] bool, the classes that a patch contains.
        majority: [N] int16, the class of most pixels (ties: the lowest id); VOID where all pixels are void.
        image: [C] bool, the classes anywhere in the image.
    """
    labels = crop_and_resize(labels, size)
    rows, columns = size[0] // patch[0], size[1] // patch[1]
    cut = labels[: rows * patch[0], : columns * patch[1]]
    pixels = cut.reshape(rows, patch[0], columns, patch[1]).swapaxes(1, 2).reshape(rows * columns, -1)
    # One histogram for all patches; column 0 counts the void pixels.
    cells = np.arange(len(pixels))[:, None] * (classes + 1) + pixels.astype(np.int64) + 1
    counts = np.bincount(cells.ravel(), minlength=len(pixels) * (classes + 1)).reshape(len(pixels), -1)[:, 1:]
    majority = np.where(counts.any(1), counts.argmax(1), VOID).astype(np.int16)
    union = counts > 0
    image = union.any(0)
    if unlabeled is not None:
        union[union.sum(1) > 1, unlabeled] = False
    return union, majority, image
