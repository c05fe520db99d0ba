"""What an encoded image claims to be, read from its first bytes and its end before any decoder sees it.

The format is told by content, whatever the file is called. A header that claims a huge picture costs nothing here;
a decoder would reserve the memory first. Whether the data between header and end are sound is the decoder's to say.
"""

import re
import struct

import numpy as np

MAX_PIXELS = 100_000_000
MAX_SIDE = 65_500
"""libjpeg's own limit."""
# A JPEG's segments lie before its picture: colour profiles and Exif need hundreds at most.
_MOST_SEGMENTS = 2_000
_END_OF_JPEG = re.compile(b"\xff\xd9")
_END_OF_PNG = re.compile(b"\0\0\0\0IEND")
# Start of frame, by the way of compression; C4, C8 and CC are other segments.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# Markers that have no place before a frame, for DALI's parser too: restarts, start, end and scan.
_MISPLACED = frozenset(range(0xD0, 0xDB)) | {0x00, 0x01}
_UNCOMPRESSED_BMP = (0, 3, 6)

# What files called .jpg turn out to be, by their first bytes.
_OTHERS = (
    (b"GIF8", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"8BPS", "Photoshop"),
    (b"%PDF", "PDF"),
    (b"PK\x03\x04", "ZIP"),
    (b"\x1f\x8b", "gzip"),
)


def _jpeg(view: memoryview) -> tuple[int, int] | str:
    position = 2
    for _ in range(_MOST_SEGMENTS):
        if view[position] != 0xFF:
            return f"broken JPEG header at byte {position}"
        marker = view[position + 1]
        if marker == 0xFF:  # padding
            position += 1
            continue
        if marker in _FRAMES:
            height, width = struct.unpack_from(">HH", view, position + 5)
            # Exif thumbnails are JPEGs with an end of their own, but they come before the frame.
            if view[-2:] == b"\xff\xd9" or _END_OF_JPEG.search(view, position):
                return height, width
            return "truncated: a JPEG without its end"
        if marker in _MISPLACED:
            return "broken JPEG header: no size before the picture"
        (length,) = struct.unpack_from(">H", view, position + 2)
        position += 2 + length
    return f"broken JPEG header: more than {_MOST_SEGMENTS} segments"


def _png(view: memoryview) -> tuple[int, int] | str:
    if view[12:16] != b"IHDR":
        return "broken PNG header"
    width, height = struct.unpack_from(">II", view, 16)
    if view[-8:-4] == b"IEND" or _END_OF_PNG.search(view, 33):
        return height, width
    return "truncated: a PNG without its end"


def _webp(view: memoryview) -> tuple[int, int] | str:
    (size,) = struct.unpack_from("<I", view, 4)
    if size + 8 > len(view):
        return f"truncated: a WebP of {size + 8} bytes ends after {len(view)}"
    kind = bytes(view[12:16])
    if kind == b"VP8 ":
        if view[23:26] != b"\x9d\x01\x2a":
            return "broken WebP header"
        width, height = struct.unpack_from("<HH", view, 26)
        return height & 0x3FFF, width & 0x3FFF
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", view, 21)
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    if kind == b"VP8X":
        low, high = struct.unpack_from("<IH", view, 24)
        return (low >> 24 | high << 8) + 1, (low & 0xFFFFFF) + 1
    return "broken WebP header"


def _bmp(view: memoryview) -> tuple[int, int] | str:
    start, kind = struct.unpack_from("<II", view, 10)
    compression = 0
    if kind == 12:  # OS/2
        width, height, _, bits = struct.unpack_from("<HHHH", view, 18)
    elif kind >= 40:
        width, height, _, bits, compression = struct.unpack_from("<iiHHI", view, 18)
        height = abs(height)  # below zero: rows from the top
    else:
        return "broken BMP header"
    # Writers leave the size in the header empty or wrong; that of the pixels can be computed.
    needed = start + (width * bits + 31) // 32 * 4 * height if compression in _UNCOMPRESSED_BMP else start
    if needed > len(view) and 0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE:
        return f"truncated: a BMP of {needed} bytes ends after {len(view)}"
    return height, width


def _foreign(head: bytes) -> str:
    """What else it is, as far as it can be told."""
    name = next((name for start, name in _OTHERS if head.startswith(start)), None)
    if name is None and head[4:8] == b"ftyp":
        name = "AVIF" if head[8:11] == b"avi" else "HEIF or video"
    if name is None and head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<svg")):
        name = "HTML or XML"
    return f"{name}, not JPEG, PNG, WebP or BMP" if name else "neither JPEG nor PNG, WebP or BMP"


def _claimed(view: memoryview) -> tuple[int, int] | str:
    head = bytes(view[:32])
    if head.startswith(b"\xff\xd8"):
        return _jpeg(view)
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png(view)
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return _webp(view)
    if head.startswith(b"BM"):
        return _bmp(view)
    return _foreign(head)


def inspect(encoded: np.ndarray | bytes) -> tuple[int, int] | str:
    """The size of an encoded image, or why it is refused. Never raises, and reserves no memory.

    Accepted are JPEG, PNG, WebP and BMP, whole, of at most 100 million pixels and 65,500 a side. What follows the
    end of a file is allowed.

    Args:
        encoded: [bytes] uint8, or bytes.

    Returns:
        (height, width) in pixels, before any Exif rotation; or the reason, a few words.
    """
    view = memoryview(encoded)
    if len(view) == 0:
        return "zero bytes"
    try:
        claimed = _claimed(view)
    except (struct.error, IndexError):
        return "truncated: it ends within its header"
    if isinstance(claimed, str):
        return claimed
    height, width = claimed
    if height * width > MAX_PIXELS:
        return f"{height} x {width} pixels, more than {MAX_PIXELS // 1_000_000} million"
    if not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE):
        return f"{height} x {width} pixels, a side must be 1 to {MAX_SIDE}"
    return claimed
