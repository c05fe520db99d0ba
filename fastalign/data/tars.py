"""Tar shards in WebDataset layout: their images are indexed by the headers and never extracted; class labels."""

import errno
import os
import re
import tarfile
from array import array
from collections.abc import Iterable, Iterator
from glob import glob
from pathlib import Path

import numpy as np

from fastalign.data.index import Index, cached_index, is_image, pack
from fastalign.utils.errors import UserError

_BLOCK = 512
_PIECE = 1 << 20
_MAX_LABEL_BYTES = 4096


class DamagedTar(Exception):
    """A tar is damaged; the message says where and how."""


def members(path: str) -> Iterator[tarfile.TarInfo]:
    """The members of a tar, or of several that were joined end to end, as `tar --ignore-zeros` lists them.

    Raises DamagedTar after the last good member, and UserError if the disk fails: a shorter shard would change the
    order of the data.
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
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DamagedTar(f"damaged at byte {position}: {reason}") from error


def _after_zeros(file, position: int) -> int | None:
    """The first block from `position` on that is not zero; None if all are."""
    file.seek(position)
    while piece := file.read(_PIECE):
        if rest := piece.lstrip(b"\0"):
            return (position + len(piece) - len(rest)) // _BLOCK * _BLOCK
        position += len(piece)
    return None


def _scan_shard(path: str) -> tuple[dict[bytes, tuple[int, int]], str]:
    """(offset, size) of the images of a tar up to its damage, by name; the damage, "" for none."""
    places: dict[bytes, tuple[int, int]] = {}
    try:
        for member in members(path):
            if member.isreg() and not member.issparse() and is_image(name := os.fsencode(member.name)):
                if name in places:
                    raise UserError(f"{path} has two images called {member.name!r}; rename or remove one")
                places[name] = member.offset_data, member.size
    except DamagedTar as error:
        return places, str(error)
    return places, ""


def _scan_shards(shards: list[str]) -> Index:
    damages, rows = [], array("q")

    def names() -> Iterator[bytes]:
        for number, shard in enumerate(shards):
            places, damage = _scan_shard(shard)
            damages.append(damage.encode("utf-8", "replace"))
            for name, place in places.items():
                rows.extend((number, *place))
                yield name

    index = pack(names())
    shard, start, size = np.ascontiguousarray(np.array(rows, dtype=np.int64).reshape(-1, 3).T)
    return index | pack(damages, "damage_") | {"shard": shard, "start": start, "size": size}


def index_tars(shards: list[str]) -> Index:
    """The images in tar files, from the cache if no shard's size or mtime changed since.

    `names`: of the members; `shard`, `start`, `size` [n]: number of the shard, place and bytes in it; `damage_names`:
    the damage of each shard, whose earlier members count.
    """
    status = [Path(shard).stat() for shard in shards]
    check = {"shard_sizes": np.array([s.st_size for s in status])}
    check["mtimes"] = np.array([s.st_mtime_ns for s in status])
    return cached_index(
        "tars:" + "\n".join(shards),
        lambda index: all(np.array_equal(index[name], check[name]) for name in check),
        lambda: _scan_shards(shards) | check,
    )


def is_tar(name: str) -> bool:
    """Whether a file name is that of a plain tar, and not hidden."""
    return name.lower().endswith(".tar") and not name.startswith(".")


def _expand_braces(pattern: str) -> list[str]:
    """`{000..009}` and `{a,b}` as a shell expands them, with zero padding."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        return [pattern]
    words, before, after = found[1].split(","), pattern[: found.start()], pattern[found.end() :]
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", found[1]):
        words = [f"{number:0{len(span[1])}d}" for number in range(int(span[1]), int(span[2]) + 1)]
    return [text for word in words for text in _expand_braces(f"{before}{word}{after}")]


def expand_shards(spec: str) -> list[str]:
    """The tar files of a folder, or of a pattern with {000..009}, {a,b}, *, ** or ?: absolute, sorted, each once."""
    path = Path(spec)
    if path.is_dir():
        found = [each for each in path.iterdir() if is_tar(each.name)]
    elif path.is_file():
        found = [path]
    else:
        patterns = _expand_braces(str(path))
        found = [name for pattern in patterns for name in glob(pattern, recursive=True) or [pattern]]  # noqa: PTH207
    if missing := next((each for each in found if not Path(each).is_file()), None if found else spec):
        raise UserError(f"no such tar file: {missing}; check the pattern, a range is written {{000..009}}")
    return each_once(found)


def each_once(paths: Iterable[str | Path]) -> list[str]:
    """Absolute paths, sorted; of several links to one file the first, under its own name."""
    files: dict[Path, str] = {}
    for path in sorted(str(Path(each).absolute()) for each in paths):
        files.setdefault(Path(path).resolve(), path)
    return list(files.values())


def stem(name: str) -> str:
    """A name without its suffix."""
    return name.rpartition(".")[0]


def class_of(image: str, classes: dict[str, str]) -> str | None:
    """The class of an image: that of its own stem, else of its WebDataset key, which ends at the first dot."""
    folder, slash, base = image.rpartition("/")
    return classes.get(stem(image), classes.get(folder + slash + base.split(".", 1)[0]))


def read_classes(shard: str) -> dict[str, str]:
    """The text of each `.cls` member of a shard, by the member's stem."""
    found: dict[str, str] = {}
    try:
        with Path(shard).open("rb") as file:
            for member in members(shard):
                if not member.isreg() or not member.name.endswith(".cls"):
                    continue
                where = f"{shard}:{member.name}"
                if not 0 < member.size <= _MAX_LABEL_BYTES:
                    raise UserError(f"{where} has {member.size} bytes; a class is a line of text")
                text = os.pread(file.fileno(), member.size, member.offset_data).decode().strip()
                if (other := found.setdefault(stem(member.name), text)) != text:
                    raise UserError(f"{where} has two labels, {other!r} and {text!r}; remove one")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8; a class is a line of text") from error
    except (DamagedTar, OSError) as error:
        raise UserError(f"cannot read the labels of {shard}: {error}; fetch it again") from error
    return found
