"""Images of every kind that is decoded, files that are refused, and ways to break an image."""

import struct

import numpy as np
from PIL import Image

from tests.data_helpers import encode, photo

SMALL = photo("chelsea").resize((90, 60))


def ycck() -> np.ndarray:
    """A JPEG whose Adobe segment says YCCK. Pillow writes CMYK only: the flag is changed, the colours with it."""
    data = bytearray(encode(SMALL.convert("CMYK"), quality=90))
    place = data.index(b"Adobe") + 11
    assert data[place] == 0
    data[place] = 2
    return np.frombuffer(bytes(data), np.uint8)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def with_thumbnail() -> np.ndarray:
    """A JPEG with a whole little JPEG in front, as cameras write it."""
    inner, whole = encode(SMALL.resize((16, 16))).tobytes(), encode(SMALL, quality=90).tobytes()
    segment = b"\xff\xe1" + struct.pack(">H", len(inner) + 2) + inner
    return np.frombuffer(whole[:2] + segment + whole[2:], np.uint8)


def png_of(width: int = 90, height: int = 60, color: int = 2) -> bytes:
    """A good PNG but for its size or type of colour."""
    data = encode(SMALL, "PNG").tobytes()
    return data[:16] + struct.pack(">II", width, height) + data[24:25] + bytes([color]) + data[26:]


def jpeg_of(bits: int = 8, components: int = 3, frames: int = 1, size: int | None = None) -> bytes:
    """A good JPEG but for its bits per sample, components or size, or one that has its size several times."""
    data = encode(SMALL, quality=90).tobytes()
    place = data.index(b"\xff\xc0")
    frame = bytearray(data[place : place + 19])
    frame[4], frame[9] = bits, components
    if size:
        frame[5:9] = struct.pack(">HH", size, size)
    return data[:place] + bytes(frame) * frames + data[place + 19 :]


def webp_with_exif(odd: bytes, image=SMALL, **options) -> np.ndarray:
    """A WebP with Exif, and a chunk of another kind whose size is odd, so that a byte of padding follows it."""
    data = encode(image, "WEBP", exif=turned(6), **options)
    (size,) = struct.unpack_from("<I", data, data.tobytes().index(odd, 30) + 4)
    assert size % 2
    return data


GOOD = {
    "jpeg": lambda: encode(SMALL, quality=90),
    "progressive": lambda: encode(SMALL, quality=90, progressive=True),
    "thumbnail": with_thumbnail,
    "garbage after the end": lambda: np.append(encode(SMALL, quality=90), np.arange(200, dtype=np.uint8)),
    "cmyk": lambda: encode(SMALL.convert("CMYK"), quality=90),
    "ycck": ycck,
    "grey": lambda: encode(SMALL.convert("L"), quality=90),
    **{f"exif {n}": lambda n=n: encode(SMALL, quality=90, exif=turned(n)) for n in range(1, 9)},
    "png": lambda: encode(SMALL, "PNG"),
    "palette png": lambda: encode(SMALL.quantize(64), "PNG"),
    "rgba png": lambda: encode(SMALL.convert("RGBA").rotate(20), "PNG"),
    "grey and alpha png": lambda: encode(SMALL.convert("LA"), "PNG"),
    "transparent palette png": lambda: encode(SMALL.quantize(64), "PNG", transparency=3),
    "one-bit png": lambda: encode(SMALL.convert("1"), "PNG"),
    "webp": lambda: encode(SMALL, "WEBP"),
    "lossless webp": lambda: encode(SMALL, "WEBP", lossless=True),
    "webp with alpha": lambda: encode(SMALL.convert("RGBA").rotate(20), "WEBP"),
    "alpha and exif": lambda: webp_with_exif(b"ALPH", SMALL.convert("RGBA").rotate(20)),
    "lossless and exif": lambda: webp_with_exif(b"VP8L", lossless=True),
    "profile and exif": lambda: webp_with_exif(b"ICCP", icc_profile=b"i" * 131),
    "exif in words": lambda: webp_with_exif(b"XMP ", xmp=b"<x>EXIF\xff\xff\xff\xff, it says.</x>"),
}
SIXTEEN_BITS = encode(SMALL.convert("L").convert("I;16"), "PNG")
REFUSED = {
    "begins with b'GIF87a": encode(SMALL, "GIF"),
    "begins with b'BM": encode(SMALL, "BMP"),
    "not a JPEG, PNG or WebP file: it begins with b'this is no i'": b"this is no image at all",
    "truncated": encode(SMALL)[:-2],
    "more than 100 million": png_of(14_000, 14_000),
    "a JPEG of 40 bits": jpeg_of(bits=40),
    "a JPEG of 8 bits and 9 components": jpeg_of(components=9),
    "broken PNG header": png_of(color=7),
    "two sizes": jpeg_of(frames=2),
    "a PNG without its end": encode(SMALL, "PNG").tobytes()[:33] + b"\x77\x35\x94\0eXIf" + bytes(50),
    "0 x 5 pixels": png_of(5, 0),
    "a side": png_of(70_000, 3),
}


def damaged(data: np.ndarray) -> np.ndarray:
    """A JPEG with a good size and end, and an impossible Huffman table."""
    data = bytearray(data.tobytes())
    place = data.index(b"\xff\xc4")
    data[place + 5 : place + 21] = b"\xff" * 16
    return np.frombuffer(bytes(data), np.uint8)


def mutate(data: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Bytes changed, anywhere or in the header, cut out, doubled or cut off."""
    data, kind = bytearray(data.tobytes()), draw.integers(5)
    place, length = int(draw.integers(len(data))), int(draw.integers(1, 64))
    if kind <= 1:
        for at in draw.integers(len(data) if kind else min(200, len(data)), size=draw.integers(1, 9)):
            data[at] = draw.integers(256)
    elif kind == 2:
        del data[place : place + length]
    elif kind == 3:
        data[place:place] = data[place : place + length]
    else:
        data = data[:place]
    return np.array(data, np.uint8)
