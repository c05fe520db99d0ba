"""Label maps: from the bytes of a PNG to a class id a pixel.

Each kind of data set has a function (encoded, name, ...) -> [H, W] int16 with ids from 0 on and VOID; they keep no
state, so that threads may share them.
"""

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
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GREY, _RGB, _PALETTE = 0, 2, 3
_COLOURS = {_GREY: "grey", _RGB: "RGB", _PALETTE: "palette", 4: "grey with alpha", 6: "RGB with alpha"}


def _png_kind(encoded: np.ndarray, name: str) -> tuple[int, int]:
    """Bits a channel and colour type, from the header: PIL would scale grey maps of fewer than 8 bits silently."""
    head = encoded[:26].tobytes()
    if len(head) < 26 or not head.startswith(_SIGNATURE):
        raise UserError(f"label map {name} is not a PNG; a label map is a PNG of class ids")
    return struct.unpack_from("BB", head, 24)


def _pixels(encoded: np.ndarray, name: str) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return np.asarray(image)
    except Exception as error:  # the decoder raises a dozen classes at damaged files
        raise UserError(
            f"cannot decode label map {name}: {first_line(error)}; fetch or write it again"
        ) from error


def _read_ids(encoded: np.ndarray, name: str) -> tuple[np.ndarray, int]:
    """Pixel values [H, W] uint8 or int32, and the bits of a pixel, 8 or 16."""
    bits, colour = _png_kind(encoded, name)
    if colour == _PALETTE:
        return _pixels(encoded, name), 8  # indices; what the palette shows is of no meaning
    if colour != _GREY:
        raise UserError(
            f"label map {name} is {_COLOURS.get(colour, 'unknown')}, where one id a pixel is expected; "
            "save it as grey (8 or 16 bits) or palette PNG"
        )
    if bits < 8:
        raise UserError(f"label map {name} is grey with {bits} bits a pixel; save it with 8 or 16 bits")
    pixels = _pixels(encoded, name)
    return (pixels if bits == 8 else pixels.astype(np.int32)), bits


def _refuse_id(name: str, value: int, classes: int, remedy: str) -> UserError:
    return UserError(f"label map {name} has the id {value}, but there are {classes} classes; {remedy}")


def decode_ids(encoded: np.ndarray, name: str, classes: int) -> np.ndarray:
    """A map whose pixels are class ids; the largest value (255, or 65535 with 16 bits) is VOID.

    Args:
        encoded: [bytes] uint8, a grey PNG of 8 or 16 bits or a palette PNG.
        name: of the file, for messages.
        classes: how many there are, C.

    Returns:
        [H, W] int16, ids 0..C-1 and VOID.

    Raises:
        UserError: no such PNG, or an id of C or more.
    """
    pixels, bits = _read_ids(encoded, name)
    void = pixels == 2**bits - 1
    wrong = (pixels >= classes) & ~void
    if wrong.any():
        worst = int(pixels[wrong].max())
        raise _refuse_id(name, worst, classes, "add the missing lines to classes.txt or correct the map")
    ids = pixels.astype(np.int16)
    ids[void] = VOID
    return ids


def coco_table(classes: int) -> np.ndarray:
    """What a pixel of a COCO-Stuff map means: its class is (value + 1) modulo 256.

    Args:
        classes: 183, or 92 where everything but the 91 things counts as unlabeled.

    Returns:
        [256] int16 for `decode_table`.
    """
    ids = (np.arange(256) + 1) % 256
    known = ids < 183
    return np.where(known, np.where(ids < classes, ids, 0), _NO_CLASS).astype(np.int16)


def ade20k_table() -> np.ndarray:
    """What a pixel of an ADE20K map means: values are class ids, 0 to 150. [256] int16 for `decode_table`."""
    ids = np.arange(256)
    return np.where(ids < 151, ids, _NO_CLASS).astype(np.int16)


def decode_table(encoded: np.ndarray, name: str, table: np.ndarray, classes: int) -> np.ndarray:
    """A map of 8 bits whose pixels are looked up in a table.

    Args:
        encoded: [bytes] uint8, a PNG.
        name: of the file, for messages.
        table: [256] int16, from pixel to class id.
        classes: how many there are, for messages.

    Returns:
        [H, W] int16 class ids.

    Raises:
        UserError: no such PNG, or a pixel that the table has no class for.
    """
    pixels, bits = _read_ids(encoded, name)
    if bits != 8:
        raise UserError(f"label map {name} has {bits} bits a pixel, this data set's have 8; fetch it again")
    ids = table[pixels]
    if (ids == _NO_CLASS).any():
        value = int(pixels[ids == _NO_CLASS].max())
        raise _refuse_id(name, value, classes, "fetch the maps again, they are not this data set's")
    return ids


@dataclass(frozen=True, eq=False)
class Panoptic:
    """What a panoptic JSON says: class names, and for each map the class of every segment."""

    path: str
    classes: tuple[str, ...]
    spans: dict[str, tuple[int, int]]
    """name of a map without its suffix -> its part of `ids` and `labels`"""
    ids: np.ndarray
    """[segments] int32, ascending within a map; each map begins with 0, unlabeled"""
    labels: np.ndarray
    """[segments] int16"""


def read_panoptic(path: Path) -> Panoptic:
    """Reads `panoptic_*2017.json`; class 0 is "unlabeled", then the categories by ascending id.

    Raises:
        UserError: the file is missing, no JSON, or not of the panoptic form.
    """
    try:
        status = path.stat()
        return _parse_panoptic(str(path), (status.st_mtime_ns, status.st_size, status.st_ino))
    except FileNotFoundError:
        raise UserError(
            f"no such file: {path}; `bash examples/download.sh coco-panoptic ROOT` in a clone of fastalign fetches it"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check its permissions") from error


@lru_cache(maxsize=2)  # train and val are parts of one file, which takes seconds
def _parse_panoptic(path: str, _version: tuple[int, ...]) -> Panoptic:
    try:
        with Path(path).open(encoding="utf-8") as file:
            content = json.load(file)
        categories = sorted((int(entry["id"]), str(entry["name"])) for entry in content["categories"])
        classes = ("unlabeled", *(name for _, name in categories))
        of_category = {number: index for index, (number, _) in enumerate(categories, start=1)}
        if len(of_category) < len(categories) or len(set(classes)) < len(classes):
            raise ValueError("a category twice")
        spans, ids, labels = {}, [], []
        for entry in content["annotations"]:
            segments = sorted((int(s["id"]), of_category[s["category_id"]]) for s in entry["segments_info"])
            name = str(entry["file_name"]).rpartition(".")[0]
            if name in spans or len(dict(segments)) < len(segments):
                raise ValueError(f"{name}.png or a segment of it is there twice")
            spans[name] = (len(ids), len(ids) + len(segments) + 1)
            ids += [0, *(number for number, _ in segments)]
            labels += [0, *(label for _, label in segments)]
        return Panoptic(path, classes, spans, np.array(ids, np.int32), np.array(labels, np.int16))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path} is not a panoptic JSON: {reason}; fetch it again") from error


def decode_panoptic(encoded: np.ndarray, name: str, stem: str, panoptic: Panoptic) -> np.ndarray:
    """A panoptic map: a pixel's segment is R + 256 G + 65536 B, and the JSON says the segment's class.

    Args:
        encoded: [bytes] uint8, an RGB PNG.
        name: of the file, for messages.
        stem: the file's name without its suffix, as in the JSON.
        panoptic: the JSON.

    Returns:
        [H, W] int16 class ids.

    Raises:
        UserError: no such PNG, or a segment that the JSON does not name for this map.
    """
    bits, colour = _png_kind(encoded, name)
    if (bits, colour) != (8, _RGB):
        kind = _COLOURS.get(colour, "unknown")
        raise UserError(f"panoptic map {name} is {kind} with {bits} bits, not RGB with 8; fetch it again")
    pixels = _pixels(encoded, name).astype(np.int32)
    segments = pixels[..., 0] + 256 * pixels[..., 1] + 65536 * pixels[..., 2]
    known = slice(*panoptic.spans[stem])
    ids, labels = panoptic.ids[known], panoptic.labels[known]
    place = np.searchsorted(ids, segments).clip(max=len(ids) - 1)
    missing = ids[place] != segments
    if missing.any():
        segment = int(segments[missing][0])
        raise UserError(f"panoptic map {name} has the segment {segment}, which {panoptic.path} does not name")
    return labels[place]
