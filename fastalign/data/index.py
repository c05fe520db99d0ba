"""Lists of images in folders and tar shards: packed names, scans, the cache on disk; class labels in shards.

Names are one blob of bytes with int64 offsets, memory-mapped from the cache: 13 million Python strings would cost
every process more than a gigabyte.
"""

import errno
import fcntl
import hashlib
import os
import sys
import tarfile
import time
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from fastalign.utils.errors import UserError, first_line
from fastalign.utils.files import write_tensors

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
_SUFFIXES = tuple(extension.encode() for extension in IMAGE_EXTENSIONS)
# A directory that changes twice within one tick of its file system's clock keeps its mtime, so a list made this soon
# after a change is not cached.
_SETTLE_NS = 2_000_000_000
_LINE_SECONDS = 10  # between two progress lines of a scan
_BLOCK, _PIECE = 512, 1 << 20  # bytes of a tar
_times = attrgetter("st_mtime_ns", "st_ctime_ns")

Index = dict[str, np.ndarray]
"""The index of a data set, as [n] uint8 and int64 arrays. A list of names is two of them, see `pack`.

`places_names`, `places_offsets`, `times`: the directories or shards that it was read from, and [n, 2] mtimes and
ctimes in ns; a tool that copies or unpacks a file may set an old mtime, but not the ctime.
"""


def pack(names: Iterable[bytes], key: str = "") -> Index:
    """Names as `names` [total] uint8, their bytes, and `offsets` [n + 1] int64; `key` is a prefix of both keys."""
    blob, offsets, shown = bytearray(), array("q", [0]), time.monotonic()
    for number, name in enumerate(names, 1):
        blob += name
        offsets.append(len(blob))
        if time.monotonic() - shown > _LINE_SECONDS:
            shown = time.monotonic()
            print(f"indexing the data set: {number} images so far", file=sys.stderr, flush=True)
    return {f"{key}names": np.frombuffer(blob, np.uint8), f"{key}offsets": np.frombuffer(offsets, np.int64)}


class Names(Sequence[str]):
    """A list of names that was packed into an index."""

    def __init__(self, index: Index, key: str = ""):
        self._blob, self._offsets = index[f"{key}names"], index[f"{key}offsets"]

    def crc(self, start: int = 0) -> int:
        """CRC-32 of all names, continued from `start`."""
        return zlib.crc32(self._blob, zlib.crc32(self._offsets, start))

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self._blob[self._offsets[index] : self._offsets[index + 1]].tobytes())


def is_image(name: bytes) -> bool:
    """Whether a path ends in one of IMAGE_EXTENSIONS (in any case) and no part of it is hidden."""
    if not name.lower().endswith(_SUFFIXES):
        return False
    return not any(part.startswith(b".") and part not in (b".", b"..") for part in name.split(b"/"))


def _scan_folder(root: str) -> Index:
    """The images below a folder as `names` relative to it, sorted in each directory, depth first."""
    folders, times = [], []

    def images() -> Iterator[bytes]:
        stack: list[tuple[bytes, tuple]] = [(b"", ())]
        while stack:
            folder, ancestors = stack.pop()
            path, prefix = os.fsencode(root) + b"/" + folder, folder + b"/" if folder else b""
            status = os.stat(path)  # noqa: PTH116
            inode = (status.st_dev, status.st_ino)
            if inode in ancestors:
                continue  # a link to a directory that contains it
            folders.append(path)
            times.append(_times(status))
            found, inside = [], []  # names relative to root
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.name.startswith(b"."):
                        continue
                    if entry.is_dir():
                        inside.append(prefix + entry.name)
                    elif is_image(entry.name):
                        found.append(prefix + entry.name)
                    elif entry.is_symlink():
                        os.stat(entry.path)  # noqa: PTH116, raises if the link's target is not mounted
            yield from sorted(found)
            stack += [(name, (*ancestors, inode)) for name in sorted(inside, reverse=True)]

    try:
        index = pack(images())
    except OSError as error:
        path = os.fsdecode(error.filename)
        raise UserError(f"cannot read {path}: {error.strerror}; repair, mount or remove it") from error
    return index | pack(folders, "places_") | {"times": np.array(times)}


def members(path: str) -> Iterator[tarfile.TarInfo]:
    """The regular files in a tar, or in several that were joined end to end, as `tar --ignore-zeros` lists them.

    Raises tarfile.ReadError after the last good member, and UserError if the disk fails: a shorter shard would change
    the order of the data.
    """
    begin, position = 0, 0
    try:
        with Path(path).open("rb") as file:
            total = os.fstat(file.fileno()).st_size
            while begin is not None:
                position = file.seek(begin)
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    while (member := tar.next()) is not None:
                        end = member.offset_data + member.size
                        # A crafted header can send the reader backwards, in an endless loop.
                        if member.size < 0 or tar.offset <= member.offset or end > total:
                            raise tarfile.ReadError(f"member {member.name!r} runs past the end of the file")
                        position = tar.offset
                        tar.members.clear()
                        if member.isreg() and not member.issparse():
                            yield member
                    # tarfile stops silently at a broken header; a proper end is a block of zeros.
                    file.seek(tar.offset)
                    if file.read(_BLOCK) != bytes(_BLOCK):
                        raise tarfile.ReadError("no member and no end mark")
                    begin = _after_zeros(file, tar.offset)
    except Exception as error:  # tarfile raises nearly anything on a bad header
        # EINVAL: a header points before the beginning of the file.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise UserError(f"cannot read {path}: {error.strerror}; is the disk available?") from error
        raise tarfile.ReadError(f"damaged at byte {position}: {first_line(error)}") from error


def _after_zeros(file, position: int) -> int | None:
    """The first block from `position` on that is not all zeros; None if there is none."""
    file.seek(position)
    while piece := file.read(_PIECE):
        if rest := piece.lstrip(b"\0"):
            return (position + len(piece) - len(rest)) // _BLOCK * _BLOCK
        position += len(piece)
    return None


def _scan_shards(shards: list[str]) -> Index:
    """The images in tar files.

    `names`: of the members; `shard`, `start`, `size` [n]: the shard's number, offset and bytes; `damage_names`: the
    damage of each shard, whose earlier members are used.
    """
    damages, rows = [], array("q")

    def names() -> Iterator[bytes]:
        for number, shard in enumerate(shards):
            found, damage = set(), ""
            try:
                for member in members(shard):
                    if is_image(name := os.fsencode(member.name)):
                        if name in found:
                            twice = f"{shard} has two images called {member.name!r}"
                            raise UserError(f"{twice}; rename or remove one")
                        found.add(name)
                        rows.extend((number, member.offset_data, member.size))
                        yield name
            except tarfile.ReadError as error:
                damage = str(error)
            damages.append(damage.encode("utf-8", "replace"))

    index = pack(names()) | pack(damages, "damage_") | pack(map(os.fsencode, shards), "places_")
    shard, start, size = np.ascontiguousarray(np.array(rows, dtype=np.int64).reshape(-1, 3).T)
    times = np.array([_times(Path(each).stat()) for each in shards])
    return index | {"times": times, "shard": shard, "start": start, "size": size}


def read_index(place: str | list[str]) -> Index:
    """The index of a folder, or of a list of tar files: from the cache if none of its places has changed."""
    scan, key = (_scan_folder, place) if isinstance(place, str) else (_scan_shards, "\n".join(place))
    digest = hashlib.sha256(os.fsencode(f"{IMAGE_EXTENSIONS} {key}")).hexdigest()
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        file = cache_folder() / f"index-{digest[:32]}.safetensors"
        locked = file.with_suffix(".lock").open("w")
    except (OSError, RuntimeError):  # no cache, or no home folder
        return scan(place)
    with locked:
        with suppress(OSError):  # of a file system without locks
            # One process per machine scans while the others wait for its index.
            fcntl.flock(locked, fcntl.LOCK_EX)
        if index := _load(file):
            return index
        start = time.time_ns()
        index = scan(place)
        if start - index["times"][:, 0].max() > _SETTLE_NS:
            with suppress(OSError, UserError):
                write_tensors(file, {name: torch.from_numpy(values) for name, values in index.items()})
                index = _load(file) or index  # processes of a machine share mapped pages
    return index


def _load(file: Path) -> Index | None:
    """The arrays of a cache file, memory-mapped; None if it is missing, damaged or out of date."""
    with suppress(OSError, SafetensorError, LookupError, ValueError):
        with safe_open(file, "pt") as tensors:
            index = {name: tensors.get_tensor(name).numpy() for name in tensors.keys()}  # noqa: SIM118
        if np.array_equal([_times(Path(place).stat()) for place in Names(index, "places_")], index["times"]):
            return index
    return None


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/fastalign, else ~/.cache/fastalign; raises RuntimeError without a home folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fastalign"


def stem(name: str) -> str:
    """A name without its suffix."""
    return name.rpartition(".")[0]


def classes_of(names: Iterable[str], numbers: Iterable[int], shards: list[str]) -> list[str | None]:
    """The class of each image by its name and the number of its shard, from the `.cls` members.

    It is that of the image's own stem, else of its WebDataset key, which ends at the first dot.
    """
    found, classes = [_read_classes(shard) for shard in shards], []
    for name, number in zip(names, numbers, strict=True):
        folder, slash, base = name.rpartition("/")
        key = folder + slash + base.split(".", 1)[0]
        classes.append(found[number].get(stem(name), found[number].get(key)))
    return classes


def _read_classes(shard: str) -> dict[str, str]:
    """The text of each `.cls` member of a shard that is not empty, by the member's stem."""
    found: dict[str, str] = {}
    try:
        with Path(shard).open("rb") as file:
            for member in members(shard):
                if not (member.size and member.name.endswith(".cls")):
                    continue
                text = os.pread(file.fileno(), member.size, member.offset_data).decode().strip()
                if (other := found.setdefault(stem(member.name), text)) != text:
                    where = f"{shard}:{member.name}"
                    raise UserError(f"{where} has two labels, {other!r} and {text!r}; remove one")
    except (tarfile.ReadError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the labels of {shard}: {error}; download it again") from error
    return found
