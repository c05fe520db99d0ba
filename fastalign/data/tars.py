"""The images in tar shards: found by their headers, never extracted. Shards may be damaged, or made to do harm."""

import errno
import itertools
import os
import re
import tarfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from glob import glob
from pathlib import Path

import numpy as np

from fastalign.data.cache import load_index, one_scanner, save_index
from fastalign.data.index import SETTLE_NS, Names, is_image
from fastalign.utils.errors import UserError

_BLOCK = 512
_MOST_HEADER_BYTES = 1 << 20


class _Headers:
    """A tar file for `tarfile`, which reads as much at once as a header claims: here a header has at most 1 MiB."""

    def __init__(self, file):
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MOST_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)


class Damaged(Exception):
    """A tar is damaged; the message says where and how. The members that came before it are good."""


def members(path: str) -> Iterator[tarfile.TarInfo]:
    """The members of a tar, or of several that were joined end to end, as `tar --ignore-zeros` lists them.

    Raises:
        Damaged: after the last good member.
        UserError: the disk fails; a shard cut there would change the order of the data.
    """
    begin, position = 0, 0
    try:
        with Path(path).open("rb") as file:
            total = os.fstat(file.fileno()).st_size
            while begin is not None:
                position = file.seek(begin)
                with tarfile.open(fileobj=_Headers(file), mode="r:") as tar:
                    while (member := tar.next()) is not None:
                        end = member.offset_data + member.size
                        # A crafted header can send the reader backwards, for ever.
                        if member.size < 0 or tar.offset <= member.offset or end > total:
                            raise tarfile.ReadError(f"member {member.name!r} runs past the end of the file")
                        position = tar.offset
                        tar.members.clear()
                        yield member
                    file.seek(tar.offset)
                    # tarfile stops without a word at a broken header; only a zero block is a proper end.
                    if file.read(_BLOCK) != bytes(_BLOCK):
                        raise tarfile.ReadError("no member and no end mark")
                    begin = _behind_zeros(file, tar.offset)
    except Exception as error:  # tarfile lets a bad header raise nearly anything, too deep recursion included
        # EINVAL: a header sends the reader to a place before the file's beginning.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise UserError(f"cannot read {path}: {error.strerror}; is the disk there?") from error
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise Damaged(f"damaged at byte {position}: {reason}") from error


def _behind_zeros(file, position: int) -> int | None:
    """Where the block begins that ends a row of zero blocks; None: zeros are all that follows."""
    file.seek(position)
    while chunk := file.read(_MOST_HEADER_BYTES):
        if rest := chunk.lstrip(b"\0"):
            return (position + len(chunk) - len(rest)) // _BLOCK * _BLOCK
        position += len(chunk)
    return None


def _scan_shard(path: str) -> tuple[list[bytes], list[tuple[int, int]], str]:
    """The images in one tar, up to its damage where it has some.

    Returns:
        Names; (offset, size) of each; what is wrong with the shard, "" for nothing.

    Raises:
        UserError: the disk fails, or two images have one name.
    """
    names, places, damage = [], [], ""
    try:
        for member in members(path):
            name = os.fsencode(member.name)
            if member.isreg() and not member.issparse() and is_image(name):
                names.append(name)
                places.append((member.offset_data, member.size))
    except Damaged as error:
        damage = str(error)
    if len(set(names)) < len(names):
        (name, _), *_ = Counter(names).most_common(1)
        first, second, *_ = (begin for each, (begin, _) in zip(names, places, strict=True) if each == name)
        raise UserError(
            f"{path} has two images called {os.fsdecode(name)!r}, at bytes {first} and {second}: names tell samples "
            "apart; rename or remove one"
        )
    return names, places, damage


def index_tars(key: str, shards: list[str]) -> dict[str, np.ndarray]:
    """The images in a list of tar files, from the cache where no shard's size or mtime changed since.

    Of a damaged shard the members before the damage count.

    Args:
        key: what the cache entry is filed under.
        shards: paths, in the order that samples shall have.

    Returns:
        `names`, `offsets`: packed member names; `shard` [n] int64; `start` [n] int64, byte offset in the
        shard; `size` [n] int64, bytes; `damage`, `damage_offsets`: packed, what is wrong with each shard.

    Raises:
        UserError: a shard that is missing or cannot be read, naming it.
    """
    try:
        status = [Path(shard).stat() for shard in shards]
    except OSError as error:
        raise UserError(f"no such shard: {error.filename}; check the pattern or fetch the file") from error
    listed = Names.pack([os.fsencode(shard) for shard in shards])
    check = {"shards": listed.blob, "shard_sizes": np.array([s.st_size for s in status], dtype=np.int64)}
    check["shard_mtimes"] = np.array([s.st_mtime_ns for s in status], dtype=np.int64)
    with one_scanner("tar", key):
        cached = load_index("tar", key)  # another rank may have scanned while this one waited
        if cached is None or not _fits(cached, check):
            cached = _index_shards(shards) | check
            settled = all(time.time_ns() - mtime > SETTLE_NS for mtime in check["shard_mtimes"].tolist())
            if settled and save_index("tar", key, cached):
                cached = load_index("tar", key) or cached
    return cached


def _fits(cached: dict[str, np.ndarray], check: dict[str, np.ndarray]) -> bool:
    """Whether a cached index is of these shards, and safe to use: what it points to lies within them."""
    if not all(name in cached and np.array_equal(cached[name], check[name]) for name in check):
        return False
    if not Names.sound(cached.get("names"), cached.get("offsets")):
        return False
    if not Names.sound(cached.get("damage"), cached.get("damage_offsets")):
        return False
    count, shards, sizes = len(cached["offsets"]) - 1, len(check["shard_sizes"]), check["shard_sizes"]
    places = [cached.get(name) for name in ("shard", "start", "size")]
    if any(place is None or place.dtype != np.int64 or len(place) != count for place in places):
        return False
    shard, start, size = places
    if len(cached["damage_offsets"]) != shards + 1 or not ((shard >= 0) & (shard < shards)).all():
        return False
    ends = sizes[shard]
    # Written so that no sum can overflow.
    return bool(((start >= 0) & (start <= ends) & (size >= 0) & (size <= ends - start)).all())


def _index_shards(shards: list[str]) -> dict[str, np.ndarray]:
    blob, lengths, places, owners, damages = bytearray(), [], [], [], []
    for number, shard in enumerate(shards):
        found, where, damage = _scan_shard(shard)
        damages.append(damage.encode("utf-8", "replace"))
        blob += b"".join(found)
        lengths.append(np.array([len(name) for name in found], dtype=np.int64))
        places.append(np.array(where, dtype=np.int64).reshape(-1, 2))
        owners.append(np.full(len(found), number, dtype=np.int64))
    names, place = Names._from_parts(blob, np.concatenate(lengths)), np.concatenate(places)
    damage = Names.pack(damages)
    arrays = {"names": names.blob, "offsets": names.offsets, "shard": np.concatenate(owners)}
    arrays |= {"start": place[:, 0].copy(), "size": place[:, 1].copy()}
    return arrays | {"damage": damage.blob, "damage_offsets": damage.offsets}


def _expand_braces(pattern: str) -> list[str]:
    """`{000..009}` and `{a,b}`, as the shell does it, zero padding kept."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices: list[list[str]] = []
    for position, part in enumerate(parts):
        span = re.fullmatch(r"(\d+)\.\.(\d+)", part)
        if position % 2 == 0:
            choices.append([part])
        elif span:
            first, last = span.groups()
            choices.append([f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)])
        else:
            choices.append(part.split(","))
    return ["".join(choice) for choice in itertools.product(*choices)]


def is_tar(name: str) -> bool:
    """Whether a file name is that of a plain tar, not hidden."""
    return name.lower().endswith(".tar") and not name.startswith(".")


def expand_shards(spec: str) -> list[str]:
    """The tar files of a path or pattern: absolute paths, sorted, each file once.

    Links keep the names that they have in the data set, whatever their targets are called.

    Args:
        spec: a .tar file, a folder of them, or a pattern with {000..009}, {a,b}, *, ** or ?.

    Raises:
        UserError: nothing matches, or a named file is missing.
    """
    path = Path(spec)
    if path.is_dir():
        found = [str(p) for p in path.iterdir() if is_tar(p.name)]
    elif path.is_file():
        found = [str(path)]
    else:
        found = []
        for pattern in _expand_braces(str(path)):
            found += glob(pattern, recursive=True) if any(c in pattern for c in "*?[") else [pattern]  # noqa: PTH207
    missing = next((name for name in found if not Path(name).is_file()), None)
    if not found or missing is not None:
        what = (
            f"no tar file matches {spec}" if missing is None else f"no such tar file: {missing} (of {spec})"
        )
        raise UserError(f"{what}; check the pattern, a range is written {{000..009}}")
    return each_once(found)


def each_once(paths: Iterable[str | Path]) -> list[str]:
    """Absolute paths, sorted; of several that lead to one file the first."""
    files: dict[Path, str] = {}
    for path in sorted(str(Path(each).absolute()) for each in paths):
        files.setdefault(Path(path).resolve(), path)
    return list(files.values())
