"""Lists of millions of images: packed names, and scans of folders; `tars.py` scans tar shards.

Names live in one blob of bytes with int64 offsets, memory-mapped from the cache, because 13 million Python
strings would cost every process more than a gigabyte.
"""

import errno
import os
import time
import zlib
from pathlib import Path

import numpy as np

from fastalign.data.cache import load_index, one_scanner, save_index
from fastalign.utils.errors import UserError

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MAX_IMAGE_BYTES = 256 * 1024 * 1024
_SUFFIXES = tuple(extension.encode() for extension in IMAGE_EXTENSIONS)
# A directory that changes twice within one tick of its file system's clock keeps its mtime: a listing taken
# this soon after the last change proves nothing, so it is not cached.
SETTLE_NS = 2_000_000_000


class Names:
    """A packed, read-only list of file names.

    Args:
        blob: [total] uint8, the names one after the other, as the file system spells them.
        offsets: [n + 1] int64, where each name starts.
    """

    def __init__(self, blob: np.ndarray, offsets: np.ndarray):
        self.blob, self.offsets = blob, offsets

    @classmethod
    def pack(cls, names: list[bytes]) -> "Names":
        """Packs a list of byte strings."""
        lengths = np.fromiter((len(name) for name in names), dtype=np.int64, count=len(names))
        return cls._from_parts(b"".join(names), lengths)

    @classmethod
    def _from_parts(cls, blob: bytes | bytearray, lengths: np.ndarray) -> "Names":
        offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        return cls(np.frombuffer(blob, dtype=np.uint8), offsets)

    @staticmethod
    def sound(blob: np.ndarray | None, offsets: np.ndarray | None) -> bool:
        """Whether two arrays that were read from a file can be a list of names: every name lies in the blob."""
        if blob is None or offsets is None or (blob.dtype, offsets.dtype) != (np.uint8, np.int64):
            return False
        if len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != len(blob):
            return False
        return bool((offsets[1:] >= offsets[:-1]).all())

    def crc(self, start: int = 0) -> int:
        """CRC-32 of all names, going on from another one."""
        return zlib.crc32(self.blob, zlib.crc32(self.offsets, start))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return os.fsdecode(self.blob[self.offsets[index] : self.offsets[index + 1]].tobytes())


def is_image(name: bytes) -> bool:
    """Whether a path ends in one of IMAGE_EXTENSIONS (any case) and no part of it is hidden."""
    if not name.lower().endswith(_SUFFIXES):
        return False
    return not any(part.startswith(b".") and part not in (b".", b"..") for part in name.split(b"/"))


DEAD_LINK = "a link that leads nowhere"


def is_dead_link(path: str | os.DirEntry) -> bool:
    """Whether a path is a link to nothing, or one of a circle of links.

    Raises:
        OSError: that cannot be told now, as where a disk fails.
    """
    try:
        path.stat() if isinstance(path, os.DirEntry) else os.stat(path)  # noqa: PTH116, an entry keeps the answer
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise
        return os.path.islink(path)  # noqa: PTH114
    return False


def _list_directory(path: bytes) -> tuple[list[bytes], list[bytes], list[bytes], int]:
    """Sorted names of images, of sub-directories, and of other links that lead nowhere; number of other files.

    Whatever is called an image and is no directory is one: that it cannot be read is for whoever reads it to say.
    """
    images, folders, lost, others = [], [], [], 0
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith(b"."):
                continue
            dead = entry.is_symlink() and is_dead_link(entry)
            if not dead and entry.is_dir():
                folders.append(entry.name)
            elif is_image(entry.name):
                images.append(entry.name)
            elif dead:
                lost.append(entry.name)
            else:
                others += 1
    return sorted(images), sorted(folders), sorted(lost), others


def _scan_folder(root: str) -> tuple[dict[str, np.ndarray], int, bool]:
    """Walks a folder depth first. Returns the index arrays, the number of other files, and whether it is settled."""
    blob, lengths, directories, mtimes, missing = bytearray(), [], [], [], []
    others, settled = 0, True
    base = os.fsencode(root)
    stack: list[tuple[bytes, tuple]] = [(b"", ())]
    while stack:
        relative, ancestors = stack.pop()
        path = os.path.join(base, relative)  # noqa: PTH118, names are bytes
        status = os.stat(path)  # noqa: PTH116
        identity = (status.st_dev, status.st_ino)
        if identity in ancestors:
            continue
        settled &= time.time_ns() - status.st_mtime_ns > SETTLE_NS
        directories.append(relative)
        mtimes.append(status.st_mtime_ns)
        images, folders, lost, other = _list_directory(path)
        others += other
        prefix = relative + b"/" if relative else b""
        missing += [prefix + name for name in lost]
        for name in images:
            blob += prefix + name
        lengths.append(np.array([len(prefix) + len(name) for name in images], dtype=np.int64))
        stack += [(prefix + name, (*ancestors, identity)) for name in reversed(folders)]
    names = Names._from_parts(blob, np.concatenate(lengths))
    arrays = {}
    for key, packed in (("", names), ("tree_", Names.pack(directories)), ("missing_", Names.pack(missing))):
        arrays |= {f"{key}names": packed.blob, f"{key}offsets": packed.offsets}
    return arrays | {"mtimes": np.array(mtimes, dtype=np.int64)}, others, settled


def _sound(arrays: dict[str, np.ndarray]) -> bool:
    """Whether a cached index is safe to use: what it points to lies within it."""
    for key in ("", "tree_", "missing_"):
        if not Names.sound(arrays.get(f"{key}names"), arrays.get(f"{key}offsets")):
            return False
    mtimes = arrays.get("mtimes")
    return mtimes is not None and mtimes.dtype == np.int64 and len(mtimes) == len(arrays["tree_offsets"]) - 1


def _unchanged(root: str, arrays: dict[str, np.ndarray]) -> bool:
    """Whether every directory of a cached index still has the mtime it was listed at, and what was missing is."""
    tree = Names(arrays["tree_names"], arrays["tree_offsets"])
    missing = Names(arrays["missing_names"], arrays["missing_offsets"])
    try:
        return all(
            (Path(root) / tree[i]).stat().st_mtime_ns == mtime
            for i, mtime in enumerate(arrays["mtimes"].tolist())
        ) and all(is_dead_link(f"{root}/{missing[i]}") for i in range(len(missing)))
    except (OSError, ValueError):  # a damaged index may name a folder that no file system can have
        return False


def index_folder(root: str) -> tuple[Names, Names, Names, int]:
    """The images below a folder, from the cache where no directory changed since.

    Order: depth first, the files of a directory before its sub-directories, each sorted by bytes; hidden
    entries are left out. Adding, removing or renaming a file changes its directory's mtime, and so the index.

    Args:
        root: resolved path of the folder.

    Returns:
        Names relative to `root`: of the images, of directories ("" is the root), and of other links that lead
        nowhere; how many other files were seen (0 when read from the cache).

    Raises:
        UserError: a folder that cannot be read.
    """
    with one_scanner("folder", root):
        arrays, others = load_index("folder", root), 0
        if arrays is None or not (_sound(arrays) and _unchanged(root, arrays)):
            try:
                arrays, others, settled = _scan_folder(root)
            except OSError as error:
                raise UserError(
                    f"cannot read {error.filename!r}: {error.strerror}; check its permissions"
                ) from error
            # An empty list is quick to make again, and only a scan can say which other files are there.
            if settled and len(arrays["offsets"]) > 1 and save_index("folder", root, arrays):
                # Mapped pages are shared by all processes of a machine, this process's copy is not.
                arrays = load_index("folder", root) or arrays
    found = (Names(arrays[f"{key}names"], arrays[f"{key}offsets"]) for key in ("", "tree_", "missing_"))
    return *found, others
