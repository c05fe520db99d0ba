"""Images paired with label maps, which is what a split of a labelled data set is."""

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
    """One split: image i and label map i belong together. Safe to use from several threads."""

    source: Source
    """encoded images, for `fastalign.data.Loader`"""
    classes: tuple[str, ...]
    """names; the index is the class id"""
    unlabeled: int | None
    """the class that means "unlabeled", None where there is none"""
    maps: Source
    """encoded label maps; number i is image i's"""
    decode: Callable[[np.ndarray, str, str], np.ndarray]
    """(encoded map, file for messages, name within `maps` without the suffix) -> [H, W] int16"""

    def __len__(self) -> int:
        return len(self.source)

    def label_map(self, index: int) -> np.ndarray:
        """The class of every pixel of an image.

        Args:
            index: of the image in `source`.

        Returns:
            [H, W] int16, the size of the image as it is stored; ids 0..C-1, VOID for pixels of no class.

        Raises:
            UserError: the map cannot be decoded, has an unknown id, or not the size of its image.
        """
        where = place(self.maps, index)
        labels = self.decode(self.maps.read(index), where, stem(self.maps.name(index)))
        size = self._image_size(index)
        if labels.shape != size:
            raise UserError(
                f"label map {where} has {labels.shape[1]} x {labels.shape[0]} pixels, its image "
                f"{place(self.source, index)} {size[1]} x {size[0]}; they must be of one size"
            )
        return labels

    def subset(self, indices: np.ndarray) -> "LabelledImages":
        """Some of the images with their maps: [n] integers, n >= 1, in that order."""
        return replace(self, source=Subset(self.source, indices), maps=Subset(self.maps, indices))

    def _image_size(self, index: int) -> tuple[int, int]:
        """(height, width), from the header alone."""
        try:
            with Image.open(io.BytesIO(self.source.read(index))) as image:
                return image.height, image.width
        except UserError:
            raise
        except Exception as error:  # the decoders raise a dozen classes at damaged files
            raise UserError(f"{place(self.source, index)} cannot be read as an image; replace it") from error

    def fingerprint(self) -> int:
        """A CRC-32 over the names of images and label maps, the bytes of a few of both, and the classes.

        Where the data set lies does not count.
        """
        crc = zlib.crc32(json.dumps([self.classes, self.unlabeled]).encode())
        for source in (self.source, self.maps):
            names = "\0".join(source.portable_name(i) for i in range(len(source)))
            crc = zlib.crc32(names.encode("utf-8", "surrogateescape"), crc)
            # Names alone would not tell two renderings apart whose files are numbered.
            for i in sorted({i * (len(source) - 1) // _SAMPLED for i in range(_SAMPLED + 1)}):
                crc = zlib.crc32(source.read(i), crc)
        return crc


def place(source: Source, index: int) -> str:
    """Where a sample is, for messages."""
    return f"{source.root}/{source.name(index)}" if source.root else source.name(index)


def _stems(source: Source, of: str) -> dict[str, int]:
    """Names without suffix -> index; the images and the maps of a split have the same ones."""
    found: dict[str, int] = {}
    for index in range(len(source)):
        other = found.setdefault(stem(source.name(index)), index)
        if other != index:
            both = f"{place(source, other)} and {place(source, index)}"
            raise UserError(f"two {of} of one name: {both}; remove one")
    return found


def pair(images: Source, maps: Source) -> Source:
    """The label maps in the order of the images, which have the same names up to the suffix.

    Raises:
        UserError: an image without a map, a map without an image, or one name twice.
    """
    pictures, labels = _stems(images, "images"), _stems(maps, "label maps")
    lonely = [index for key, index in pictures.items() if key not in labels]
    if lonely:
        where = maps.root or "the same shard"
        raise UserError(
            f"{len(lonely)} of {len(images)} images have no label map in {where}, first {place(images, lonely[0])}; "
            "add the maps (the same name with .png) or remove the images"
        )
    orphans = [index for key, index in labels.items() if key not in pictures]
    if orphans:
        where = images.root or "the same shard"
        raise UserError(
            f"{len(orphans)} of {len(maps)} label maps have no image in {where}, first {place(maps, orphans[0])}; "
            "add the images or remove the maps"
        )
    return Subset(maps, np.array([labels[key] for key in pictures]))
