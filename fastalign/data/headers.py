"""The size of an encoded image, read from its header, and a check of its end, before any decoder reads it.

The format is recognized by content. Nothing is allocated, whatever size a header claims. Only the decoder checks the
data between header and end.

Headers that DALI's parser refuses, or has no sample type for (a JPEG of 40 bits or 9 components), must be refused
here: DALI 2.4 abandons such a batch while its threads work on it, and the process crashes. Pillow accepts many of
them, such as a JPEG with junk between its segments.
"""

import re
import struct

import numpy as np

MAX_PIXELS = 100_000_000
MAX_SIDE = 65_500  # libjpeg's limit
_MAX_SEGMENTS, _MAX_CHUNKS = 2_000, 1_000_000  # of a JPEG before its scan, of a PNG
_END_OF_JPEG = re.compile(b"\xff\xd9")
_WEBP_FLAGS, _WEBP_EXIF = 20, 0x08
_SCAN = 0xDA
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_MISPLACED = frozenset(range(0xD0, 0xDA)) | {0x00, 0x01}  # restarts, start and end: not allowed before a scan
_PNG_BITS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}  # by type of colour


def _jpeg(view: memoryview) -> tuple[int, int] | str:
    position, size = 2, None
    for _ in range(_MAX_SEGMENTS):
        if view[position] != 0xFF:
            return f"broken JPEG header at byte {position}"
        marker = view[position + 1]
        if marker == 0xFF:  # padding
            position += 1
            continue
        if marker == _SCAN and size:
            # Exif thumbnails are JPEGs with their own end marker, but they precede the scan.
            if view[-2:] == b"\xff\xd9" or _END_OF_JPEG.search(view, position):
                return size
            return "truncated: a JPEG without its end"
        if marker in _MISPLACED or marker == _SCAN:
            return "broken JPEG header: no size before the picture"
        (length,) = struct.unpack_from(">H", view, position + 2)
        if length < 2 or (marker == 0xE1 and length < 8):
            return f"broken JPEG header at byte {position}"
        if marker in _FRAMES:
            if size:  # a decoder may use the second one
                return "broken JPEG header: two sizes"
            bits, height, width, components = struct.unpack_from(">BHHB", view, position + 4)
            if bits != 8 or components not in (1, 3, 4):
                return f"a JPEG of {bits} bits and {components} components"
            size = height, width
        position += 2 + length
    return f"broken JPEG header: more than {_MAX_SEGMENTS} segments"


def _png(view: memoryview) -> tuple[int, int] | str:
    length, kind, width, height, bits, color = struct.unpack_from(">I4sIIBB", view, 8)
    if (length, kind) != (13, b"IHDR") or bits not in _PNG_BITS.get(color, ()):
        return "broken PNG header"
    position = 33
    for _ in range(_MAX_CHUNKS):
        if position + 8 > len(view):
            return "truncated: a PNG without its end"
        length, kind = struct.unpack_from(">I4s", view, position)
        if kind == b"IEND":
            return height, width
        position += length + 12
    return f"broken PNG: more than {_MAX_CHUNKS} chunks"


def _webp(view: memoryview) -> tuple[int, int] | str:
    size, form = struct.unpack_from("<I4s", view, 4)
    if form != b"WEBP":
        return f"a RIFF file of the kind {form!r}, not WebP"
    if size + 8 > len(view):
        return f"truncated: a WebP of {size + 8} bytes ends after {len(view)}"
    kind = bytes(view[12:16])
    if kind == b"VP8 " and view[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", view, 26)
        return height & 0x3FFF, width & 0x3FFF
    if kind == b"VP8L":
        signature, bits = struct.unpack_from("<BI", view, 20)
        if signature == 0x2F and bits >> 29 == 0:
            return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    if kind == b"VP8X":
        low, high = struct.unpack_from("<IH", view, 24)
        return (low >> 24 | high << 8) + 1, (low & 0xFFFFFF) + 1
    return "broken WebP header"


_PARSERS = {b"\xff\xd8": _jpeg, b"\x89PNG\r\n\x1a\n": _png, b"RIFF": _webp}  # by signature


def read_size(encoded: np.ndarray | bytes) -> tuple[int, int] | str:
    """The size (height, width) of an encoded image, before any Exif rotation, or why it is refused. Never raises.

    Accepted are complete JPEG, PNG and WebP files of at most 100 million pixels and 65,500 a side.
    """
    view = memoryview(encoded)
    head = bytes(view[:12])
    parse = next((parser for signature, parser in _PARSERS.items() if head.startswith(signature)), None)
    if parse is None:
        return f"not a JPEG, PNG or WebP file: it begins with {head!r}"
    try:
        size = parse(view)
    except (struct.error, IndexError):
        return "truncated: it ends within its header"
    if isinstance(size, str):
        return size
    height, width = size
    if height * width > MAX_PIXELS:
        return f"{height} x {width} pixels, more than {MAX_PIXELS // 1_000_000} million"
    if not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE):
        return f"{height} x {width} pixels, a side must be 1 to {MAX_SIDE}"
    return size


def without_exif(encoded: np.ndarray) -> np.ndarray:
    """The same image [bytes] uint8 for DALI, with the Exif flag of a WebP cleared.

    DALI 2.4 reads Exif even if it applies no orientation. After chunks of odd size it reads outside the file, and it
    allocates as much memory as the chunk claims.
    """
    head = encoded[: _WEBP_FLAGS + 1].tobytes()
    if head[:4] + head[8:16] != b"RIFFWEBPVP8X" or not head[_WEBP_FLAGS] & _WEBP_EXIF:
        return encoded
    encoded = encoded.copy()
    encoded[_WEBP_FLAGS] &= ~np.uint8(_WEBP_EXIF)
    return encoded
