"""One file over HTTP, continued where it was cut off."""

import http.client
import re
import shutil
import time
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from fastalign.errors import UserError

ATTEMPTS = 5
"""tries in a row that bring nothing, before the transfer is given up"""
PAUSE = 2.0
"""seconds before the second try; doubles with each"""
TIMEOUT = 60.0
"""seconds without a byte"""

_CHUNK = 1 << 20
_REPORT_EVERY = 15.0


class _Cut(Exception):
    """The transfer ended early; what arrived is kept."""


def fetch(url: str, target: Path) -> None:
    """Downloads a file, which appears under its name only when complete; until then it is `target`.part.

    Args:
        url: http or https.
        target: the file to write. Where a .part of it is left, the transfer goes on behind it.

    Raises:
        UserError: the server refuses, or the transfer was cut off ATTEMPTS times without a byte in between.
        OSError: the disk.
    """
    part = target.with_name(f"{target.name}.part")
    failures = 0
    while True:
        before = _size(part)
        try:
            _transfer(url, part, before)
            break
        except _Cut as cut:
            failures = failures + 1 if _size(part) <= before else 0
            if failures >= ATTEMPTS:
                raise UserError(
                    f"{url}: {cut}; {_size(part):,} bytes are kept, the same command goes on from there"
                ) from None
            print(f"{target.name}: {cut}; trying again", flush=True)
            time.sleep(PAUSE * 2**failures)
    part.replace(target)


def require_space(folder: Path, needed: int) -> None:
    """Checks that a disk has room.

    Raises:
        UserError: fewer than `needed` bytes are free.
    """
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder} has {free:,} bytes free, {needed:,} are needed; make room and run the command again"
        )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _open(url: str, start: int) -> http.client.HTTPResponse:
    headers = {"User-Agent": "fastalign"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        return urlopen(Request(url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        if error.code == 416:
            raise
        if error.code == 429 or error.code >= 500:
            raise _Cut(f"the server answers {error.code} {error.reason}") from None
        raise UserError(
            f"{url}: the server answers {error.code} {error.reason}; find the file's new place, --base-url takes it"
        ) from None
    except ValueError:
        raise UserError(f"{url} is not a URL; --base-url begins with http:// or https://") from None
    except (OSError, http.client.HTTPException) as error:
        raise _Cut(f"no connection ({getattr(error, 'reason', None) or error})") from None


def _transfer(url: str, part: Path, start: int) -> None:
    """Appends what is missing of a file.

    Raises:
        _Cut: it is not complete yet.
    """
    try:
        response = _open(url, start)
    except HTTPError as error:  # 416: there is nothing behind `start`
        if error.headers.get("Content-Range") in (None, f"bytes */{start}"):
            return  # some servers do not say how long the file is; the digest tells
        part.unlink(missing_ok=True)
        raise _Cut("the file on the server is another now, beginning anew") from None
    with response:
        length = response.headers.get("Content-Length")
        if response.status == 206:
            span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
            if not span or int(span[1]) != start:
                part.unlink()
                raise _Cut("the server continues at another byte, beginning anew")
            total = int(span[2])
        else:  # the server knows no ranges and sends all of it
            start, total = 0, int(length) if length else None
        require_space(part.parent, (total or start) - start)
        with part.open("ab" if start else "wb") as file:
            _copy(response, file, part.stem, total)
    if total is not None and _size(part) != total:
        raise _Cut(f"cut off at {_size(part):,} of {total:,} bytes")


def _copy(response: http.client.HTTPResponse, file, name: str, total: int | None) -> None:
    reported = time.monotonic()
    while True:
        try:
            chunk = response.read(_CHUNK)
        except (OSError, http.client.HTTPException):
            return  # the size tells
        if not chunk:
            return
        file.write(chunk)
        if time.monotonic() - reported > _REPORT_EVERY:
            reported = time.monotonic()
            print(f"{name}: {file.tell():,} of {total or 0:,} bytes", flush=True)
