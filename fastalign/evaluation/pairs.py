"""Images paired with label maps: one split of a labelled data set."""

import io
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from fastalign.data.source import Source, Subset
from fastalign.data.tars import stem
from fastalign.utils.errors import UserError

_SAMPLED = 8


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """One split: image i belongs to label map i. Safe to use from several threads."""

    source: Source
    """encoded images, for `fastalign.data.Loader`"""
    classes: tuple[str, ...]
    """names; the index is the class id"""
    unlabeled: int | None
    """the class that means "unlabeled"; None = there is none"""
    maps: Source
    """encoded label maps"""
    decode: Callable[[np.ndarray, str, str], np.ndarray]
    """(encoded map, file for messages, name within `maps` without the suffix) -> [H, W] int16"""

    def __len__(self) -> int:
        return len(self.source)

    def label_map(self, index: int) -> np.ndarray:
        """The class of every pixel of an image: [H, W] int16, ids 0..C-1 and VOID, the size of the stored image.

        Raises:
            UserError: the map cannot be decoded, has an unknown id, or another size than its image.
        """
        file, image = location(self.maps, index), location(self.source, index)
        labels = self.decode(self.maps.read(index), file, stem(self.maps.name(index)))
        encoded = io.BytesIO(self.source.read(index))
        try:
            with Image.open(encoded) as opened:
                width, height = opened.size
        except Exception as error:  # the decoders raise a dozen classes for damaged files
            raise UserError(f"{image} cannot be read as an image; replace it") from error
        if labels.shape != (height, width):
            raise UserError(
                f"label map {file} has {labels.shape[1]} x {labels.shape[0]} pixels, its image {image} has "
                f"{width} x {height}; make them the same size"
            )
        return labels

    def subset(self, indices: np.ndarray) -> "LabelledImages":
        """Some of the images with their maps: [n] integers, n >= 1, in that order."""
        return replace(self, source=Subset(self.source, indices), maps=Subset(self.maps, indices))

    def fingerprint(self) -> int:
        """CRC-32 of all file names, the bytes of a few files, and the classes; independent of the location."""
        crc = zlib.crc32(json.dumps([self.classes, self.unlabeled]).encode())
        for source in (self.source, self.maps):
            names = "\0".join(source.portable_name(i) for i in range(len(source)))
            crc = zlib.crc32(names.encode("utf-8", "surrogateescape"), crc)
            # Names alone would not distinguish two renderings with numbered files.
            for i in sorted({i * (len(source) - 1) // _SAMPLED for i in range(_SAMPLED + 1)}):
                crc = zlib.crc32(source.read(i), crc)
        return crc


def location(source: Source, index: int) -> str:
    """A sample's path, for messages."""
    return f"{source.root}/{source.name(index)}" if source.root else source.name(index)


def pair(images: Source, maps: Source) -> Source:
    """The label maps in the order of the images, matched by name without suffix.

    Raises:
        UserError: an image without a map, a map without an image, or one name twice.
    """
    by_image, by_map = _by_stem(images, "images"), _by_stem(maps, "label maps")
    for one, other, keys, of, to in (
        (images, maps, by_image.keys() - by_map.keys(), "images", "label map"),
        (maps, images, by_map.keys() - by_image.keys(), "label maps", "image"),
    ):
        if keys:
            first = min((by_image if one is images else by_map)[key] for key in keys)
            raise UserError(
                f"{len(keys)} of {len(one)} {of} have no {to} in {other.root or 'the same shard'}, first "
                f"{location(one, first)}; an image and its map have the same name, the map with .png"
            )
    return Subset(maps, np.array([by_map[key] for key in by_image]))


def _by_stem(source: Source, of: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for index in range(len(source)):
        other = found.setdefault(stem(source.name(index)), index)
        if other != index:
            both = f"{location(source, other)} and {location(source, index)}"
            raise UserError(f"two {of} of one name: {both}; remove one")
    return found
