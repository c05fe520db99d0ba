"""The command ``python -m fastalign.labelled.download coco|ade20k --to ROOT``: what the probes use of the two.

Interrupted at any point, the same command goes on: transfers continue in `.part` files, and files that are unpacked
already stay. Archives are checked against published digests; where none is published, against the one that the first
download left in ROOT/checksums.json.
"""

import argparse
import contextlib
import hashlib
import json
import shutil
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from fastalign.data.cache import lock
from fastalign.engine.files import write_atomically
from fastalign.errors import UserError
from fastalign.labelled.archives import Archive, Piece, archives
from fastalign.labelled.datasets import SPLITS
from fastalign.labelled.transfer import fetch, require_space
from fastalign.paths import path_argument

_CHUNK = 1 << 20
RECORD = "checksums.json"


def download(
    data: str,
    root: Path,
    *,
    splits: tuple[str, ...] = SPLITS,
    panoptic: bool = False,
    keep_archives: bool = False,
    base_url: str | None = None,
) -> None:
    """Fetches, checks and unpacks a data set; does nothing where that is done.

    Args:
        data: "coco" or "ade20k".
        root: the folder; it gets `images/`, `annotations/` and checksums.json.
        splits: as `open_labelled` names them: "train" and "val" come from the published training split, "test" from
            the published validation split.
        panoptic: COCO's panoptic maps instead of those of COCO-Stuff.
        keep_archives: leave the zip files in `root`.
        base_url: where the archives lie under their names, instead of their publishers' sites.

    Raises:
        UserError: a site that does not answer, an archive that is not the published one, no space left.
    """
    if root.exists() and not root.is_dir():
        raise UserError(f"--to {root} is a file; name a folder")
    published = {"val" if split == "test" else "train" for split in splits}
    root.mkdir(parents=True, exist_ok=True)
    with _alone(root):
        record = _read_record(root)
        for archive in archives(data, panoptic):
            pieces = [piece for piece in archive.pieces if piece.split in published]
            if not pieces:
                continue
            done = record.get(archive.name, {}).get("unpacked", {})
            if all(_is_there(root, piece, done) for piece in pieces):
                print(f"{archive.name}: already unpacked")
                continue
            path = root / archive.name
            if not path.exists():
                fetch(f"{base_url.rstrip('/')}/{archive.name}" if base_url else archive.url, path)
            entry = _verify(path, archive, record.get(archive.name))
            entry["unpacked"] = done | _unpack(path, pieces, root)
            record[archive.name] = entry
            _write_record(root, record)
            if not keep_archives:
                path.unlink()


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Keeps a second command out of the folder; the lock goes with the process."""
    with (root / ".download.lock").open("a") as file:
        if not lock(file.fileno(), wait=False):
            raise UserError(f"--to {root}: another download is writing there; wait for it")
        yield


def _read_record(root: Path) -> dict[str, dict]:
    path = root / RECORD
    try:
        record = json.loads(path.read_text())
        if not isinstance(record, dict) or not all(isinstance(entry, dict) for entry in record.values()):
            raise ValueError
        return record
    except FileNotFoundError:
        return {}
    except ValueError:
        raise UserError(f"{path} is damaged; delete it, and what it recorded is checked anew") from None


def _write_record(root: Path, record: dict[str, dict]) -> None:
    text = json.dumps(record, indent=1) + "\n"
    write_atomically(root / RECORD, lambda file: file.write(text.encode()))


def _is_there(root: Path, piece: Piece, done: dict[str, int]) -> bool:
    """Whether a piece was unpacked and nothing of it has gone since."""
    path = root / piece.to
    if piece.to not in done or not path.exists():
        return False
    return path.is_file() or sum(not p.name.startswith(".") for p in path.iterdir()) >= done[piece.to]


def _verify(path: Path, archive: Archive, known: dict | None) -> dict:
    """The record's entry of an archive that is the published one, or the one of the first download."""
    algorithm, _, expected = (archive.digest or "").partition(":")
    print(f"{archive.name}: checking {path.stat().st_size:,} bytes", flush=True)
    with path.open("rb") as file:
        sha256, other = hashlib.sha256(), hashlib.new(algorithm or "sha256")
        while chunk := file.read(_CHUNK):
            sha256.update(chunk)
            if algorithm not in ("", "sha256"):
                other.update(chunk)
    entry = {"bytes": path.stat().st_size, "sha256": sha256.hexdigest()}
    found = sha256.hexdigest() if algorithm == "sha256" else other.hexdigest()
    if expected and found != expected:
        path.unlink()
        raise UserError(
            f"{archive.name}: {algorithm} is {found}, not {expected} as published; deleted, run the command again"
        )
    if known and known.get("sha256") != entry["sha256"]:
        raise UserError(
            f"{path} is not the archive of the first download: sha256 {entry['sha256']}, {RECORD} has "
            f"{known.get('sha256')}; delete the file, or {RECORD} where its publisher changed it"
        )
    return entry


def _unpack(path: Path, pieces: list[Piece], root: Path) -> dict[str, int]:
    """Unpacks pieces of an archive: path below `root` -> number of files."""
    counts = {}
    try:
        with zipfile.ZipFile(path) as whole:
            for piece in pieces:
                print(f"{path.name}: unpacking {piece.to}", flush=True)
                if piece.inner:
                    counts[piece.to] = _unpack_inner(whole, piece, root)
                else:
                    counts[piece.to] = _extract(whole, piece.inside, root / piece.to)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        path.unlink()
        raise UserError(f"{path} is damaged ({error}); deleted, run the command again") from error
    return counts


def _unpack_inner(whole: zipfile.ZipFile, piece: Piece, root: Path) -> int:
    """Unpacks a folder of an archive that lies in another."""
    inner = root / f".{PurePosixPath(piece.inside).name}"
    try:
        _extract(whole, piece.inside, inner)
        with zipfile.ZipFile(inner) as archive:
            return _extract(archive, piece.inner, root / piece.to)
    finally:
        inner.unlink(missing_ok=True)


def _extract(archive: zipfile.ZipFile, inside: str, to: Path) -> int:
    """Writes a file, or the files directly in a folder; each appears whole or not at all, its CRC checked."""
    members = {}
    for info in archive.infolist():
        folder, _, name = info.filename.rpartition("/")
        if info.is_dir():
            continue
        if info.filename == inside:
            members[to] = info
        elif f"{folder}/" == inside and name and not name.startswith("."):
            members[to / name] = info
    if not members:
        raise zipfile.BadZipFile(f"it holds no {inside}")
    missing = {path: info for path, info in members.items() if not _is_member(path, info)}
    require_space(to.parent, sum(info.file_size for info in missing.values()))
    to.parent.mkdir(parents=True, exist_ok=True)
    for path, info in missing.items():
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_name(f".{path.name}.part")
        try:
            with archive.open(info) as source, temporary.open("wb") as file:
                shutil.copyfileobj(source, file, _CHUNK)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    return len(members)


def _is_member(path: Path, info: zipfile.ZipInfo) -> bool:
    """Whether a file on disk is a member of the archive already."""
    if not path.is_file() or path.stat().st_size != info.file_size:
        return False
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc == info.CRC


def _splits(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in SPLITS:
            raise UserError(
                f"--splits {text}: there is no {name!r}; a list of train, val and test, with commas"
            )
    return names


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns the exit code: 0, 2 for bad input, 130 where it was stopped by hand."""
    parser = argparse.ArgumentParser(
        prog="python -m fastalign.labelled.download", description="Fetch COCO 2017 or ADE20K for the probes."
    )
    parser.add_argument("data", choices=("coco", "ade20k"))
    parser.add_argument("--to", required=True, type=path_argument, metavar="ROOT", help="the folder to write")
    parser.add_argument(
        "--splits", default="train,val,test", help="default train,val,test; train and val come together"
    )
    parser.add_argument(
        "--panoptic", action="store_true", help="COCO's panoptic maps instead of COCO-Stuff's"
    )
    parser.add_argument("--keep-archives", action="store_true", help="do not delete the zip files at the end")
    parser.add_argument(
        "--base-url", metavar="URL", help="another place that has the zip files under their names"
    )
    options = parser.parse_args(arguments)
    try:
        if options.panoptic and options.data != "coco":
            raise UserError("--panoptic: only coco has panoptic maps; leave it out")
        download(
            options.data,
            Path(options.to),
            splits=_splits(options.splits),
            panoptic=options.panoptic,
            keep_archives=options.keep_archives,
            base_url=options.base_url,
        )
    except UserError as error:
        print(f"fastalign: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else f"--to {options.to}: "
        print(
            f"fastalign: {where}{error.strerror or error}; the same command goes on from here",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("fastalign: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    print(f"ready: {'coco-panoptic' if options.panoptic else options.data}:{options.to}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
