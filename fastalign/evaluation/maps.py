"""Decoding label maps: from the bytes of a PNG to the class id of each pixel, [H, W] int16."""

import io
import json
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from fastalign.utils.errors import UserError, first_line

VOID = -1
"""The id of pixels that belong to no class."""

_NO_CLASS = -2
_GREY, _RGB, _PALETTE = 0, 2, 3
_COLOURS = {_GREY: "grey", _RGB: "RGB", _PALETTE: "palette", 4: "grey with alpha", 6: "RGB with alpha"}


def _read_png(
    encoded: np.ndarray, name: str, colours: tuple[int, ...], depths: tuple[int, ...]
) -> np.ndarray:
    """Pixel values, of a PNG of one of the colour types and bit depths."""
    head = encoded[:26].tobytes()
    if len(head) < 26 or not head.startswith(b"\x89PNG\r\n\x1a\n"):
        raise UserError(f"label map {name} is not a PNG; a label map is a PNG of class ids")
    bits, colour = struct.unpack_from("BB", head, 24)
    # PIL would silently scale grey values of fewer than 8 bits.
    if colour not in colours or (bits not in depths and colour != _PALETTE):
        wanted = (
            f"{' or '.join(_COLOURS[each] for each in colours)} with {' or '.join(map(str, depths))} bits"
        )
        raise UserError(
            f"label map {name} is {_COLOURS.get(colour, 'unknown')} with {bits} bits, not {wanted}; save it so"
        )
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return np.asarray(image)
    except Exception as error:  # the decoder raises a dozen classes for damaged files
        raise UserError(f"cannot decode label map {name}: {first_line(error)}; replace it") from error


def decode_ids(encoded: np.ndarray, name: str, classes: int) -> np.ndarray:
    """A map whose pixels are class ids; the largest value (255, or 65535 with 16 bits) is VOID.

    Args:
        encoded: [bytes] uint8, a grey PNG of 8 or 16 bits or a palette PNG.
        name: of the file, for messages.
        classes: how many there are, C.

    Raises:
        UserError: another kind of file, or an id of C or more.
    """
    pixels = _read_png(encoded, name, (_GREY, _PALETTE), (8, 16))
    void = pixels == (255 if pixels.dtype == np.uint8 else 65535)
    ids = np.where(void, VOID, pixels.astype(np.int32))
    if ids.max() >= classes:
        raise UserError(
            f"label map {name} has the id {ids.max()}, but there are {classes} classes; "
            "add the missing lines to classes.txt or correct the map"
        )
    return ids.astype(np.int16)


def coco_table(classes: int) -> np.ndarray:
    """For `decode_table`: of COCO-Stuff, value + 1 modulo 256; with 92 classes, stuff counts as unlabeled."""
    ids = (np.arange(256) + 1) % 256
    return np.where(ids < 183, np.where(ids < classes, ids, 0), _NO_CLASS).astype(np.int16)


def ade20k_table() -> np.ndarray:
    """For `decode_table`: of ADE20K, values are class ids, 0 to 150."""
    ids = np.arange(256)
    return np.where(ids < 151, ids, _NO_CLASS).astype(np.int16)


def decode_table(encoded: np.ndarray, name: str, table: np.ndarray, classes: int) -> np.ndarray:
    """A map of 8 bits whose pixels are looked up in a table, [256] int16.

    Raises:
        UserError: another kind of file, or a pixel that has no class.
    """
    pixels = _read_png(encoded, name, (_GREY, _PALETTE), (8,))
    ids = table[pixels]
    if (ids == _NO_CLASS).any():
        raise UserError(
            f"label map {name} has the id {pixels[ids == _NO_CLASS].max()}, but there are {classes} classes; "
            "download the maps again"
        )
    return ids


@dataclass(frozen=True, eq=False)
class Panoptic:
    """The content of a panoptic JSON: class names, and for each map the class of every segment."""

    path: str
    classes: tuple[str, ...]
    segments: dict[str, tuple[np.ndarray, np.ndarray]]
    """name of a map without suffix -> ids, ascending and beginning with 0 (unlabeled), and their classes"""


@lru_cache(maxsize=2)  # train and val are parts of one file, which takes seconds
def read_panoptic(path: Path) -> Panoptic:
    """Reads `panoptic_*2017.json`; class 0 is "unlabeled", then the categories by ascending id.

    Raises:
        UserError: the file is missing, or not a panoptic JSON.
    """
    try:
        content = json.loads(path.read_bytes())
        categories = sorted((int(entry["id"]), str(entry["name"])) for entry in content["categories"])
        of_category = {number: index for index, (number, _) in enumerate(categories, start=1)}
        segments = {}
        for entry in content["annotations"]:
            pairs = sorted((int(s["id"]), of_category[s["category_id"]]) for s in entry["segments_info"])
            ids, labels = np.array([(0, 0), *pairs], np.int32).T
            segments[str(entry["file_name"]).rpartition(".")[0]] = (ids.copy(), labels.astype(np.int16))
        return Panoptic(str(path), ("unlabeled", *(name for _, name in categories)), segments)
    except FileNotFoundError:
        raise UserError(
            f"no such file: {path}; `bash examples/download.sh coco-panoptic ROOT` in a clone of fastalign fetches it"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path} is not a panoptic JSON: {reason}; download it again") from error


def decode_panoptic(encoded: np.ndarray, name: str, stem: str, panoptic: Panoptic) -> np.ndarray:
    """A panoptic map: a pixel's segment is R + 256 G + 65536 B, and the JSON has the segment's class.

    Raises:
        UserError: another kind of file, or a segment that the JSON does not have for this map.
    """
    pixels = _read_png(encoded, name, (_RGB,), (8,)).astype(np.int32)
    segments = pixels[..., 0] + 256 * pixels[..., 1] + 65536 * pixels[..., 2]
    ids, labels = panoptic.segments[stem]
    position = np.searchsorted(ids, segments).clip(max=len(ids) - 1)
    unknown = ids[position] != segments
    if unknown.any():
        raise UserError(
            f"label map {name} has the segment {segments[unknown][0]}, which {panoptic.path} lacks"
        )
    return labels[position]
