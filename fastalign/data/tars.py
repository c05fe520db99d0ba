"""Tar shards in WebDataset layout: their images are indexed by the headers and never extracted; class labels."""

import errno
import os
import re
import tarfile
from array import array
from collections.abc import Iterator
from glob import glob
from pathlib import Path

import numpy as np

from fastalign.data.index import Index, is_image, pack
from fastalign.utils.errors import UserError

_BLOCK = 512
_PIECE = 1 << 20


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


def scan_shards(shards: list[str]) -> Index:
    """The images in tar files.

    `names`: of the members; `shard`, `start`, `size` [n]: number of the shard, place and bytes in it; `damage_names`:
    the damage of each shard, whose earlier members count.
    """
    damages, rows = [], array("q")

    def names() -> Iterator[bytes]:
        for number, shard in enumerate(shards):
            found, damage = set(), ""
            try:
                for member in members(shard):
                    if (
                        member.isreg()
                        and not member.issparse()
                        and is_image(name := os.fsencode(member.name))
                    ):
                        if name in found:
                            raise UserError(
                                f"{shard} has two images called {member.name!r}; rename or remove one"
                            )
                        found.add(name)
                        rows.extend((number, member.offset_data, member.size))
                        yield name
            except DamagedTar as error:
                damage = str(error)
            damages.append(damage.encode("utf-8", "replace"))

    index = pack(names()) | pack(damages, "damage_") | pack(map(os.fsencode, shards), "places_")
    shard, start, size = np.ascontiguousarray(np.array(rows, dtype=np.int64).reshape(-1, 3).T)
    mtimes = np.array([Path(each).stat().st_mtime_ns for each in shards])
    return index | {"mtimes": mtimes, "shard": shard, "start": start, "size": size}


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
    """The tar files of a path, or of a pattern with {000..009}, {a,b}, *, ** or ?: absolute, sorted, each once."""
    patterns = [spec] if Path(spec).is_file() else _expand_braces(spec)
    found = [name for pattern in patterns for name in glob(pattern, recursive=True) or [pattern]]  # noqa: PTH207
    if missing := next((each for each in found if not Path(each).is_file()), None if found else spec):
        raise UserError(f"no such tar file: {missing}; check the pattern, a range is written {{000..009}}")
    return sorted({str(Path(each).absolute()) for each in found})


def stem(name: str) -> str:
    """A name without its suffix."""
    return name.rpartition(".")[0]


def class_of(image: str, classes: dict[str, str]) -> str | None:
    """The class of an image: that of its own stem, else of its WebDataset key, which ends at the first dot."""
    folder, slash, base = image.rpartition("/")
    return classes.get(stem(image), classes.get(folder + slash + base.split(".", 1)[0]))


def read_classes(shard: str) -> dict[str, str]:
    """The text of each `.cls` member of a shard that is not empty, by the member's stem."""
    found: dict[str, str] = {}
    try:
        with Path(shard).open("rb") as file:
            for member in members(shard):
                if not (member.isreg() and member.size and member.name.endswith(".cls")):
                    continue
                text = os.pread(file.fileno(), member.size, member.offset_data).decode().strip()
                if (other := found.setdefault(stem(member.name), text)) != text:
                    where = f"{shard}:{member.name}"
                    raise UserError(f"{where} has two labels, {other!r} and {text!r}; remove one")
    except (DamagedTar, OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the labels of {shard}: {error}; fetch it again") from error
    return found
