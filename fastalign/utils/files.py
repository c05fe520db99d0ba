"""Files that are never half: written in one go, cleaned up after, checked."""

import errno
import os
import pickle
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from fastalign.utils.errors import UserError, first_line

_TEMPORARY = re.compile(r"\..+\.(\d+)$")


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file under a temporary name, flush it to the disk, then rename it: nobody ever sees half of it.

    When this returns, a power failure does not undo it. The file's mode follows the umask.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        flush_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: dict[str, Tensor], **metadata: str) -> None:
    """Write a safetensors file as `write_atomically` does: safetensors' own writer gives it mode 0600.

    Args:
        path: the file.
        tensors: by name, contiguous.
        **metadata: texts for its header, beside the format.
    """
    content = safetensors.torch.save(tensors, {"format": "pt", **metadata})
    write_atomically(path, lambda file: file.write(content))


def temporary_name(path: Path) -> Path:
    """Where this process writes what will become `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def flush_folder(folder: Path) -> None:
    """Flush a folder's names to the disk, where the file system can do that."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)


def remove_leftovers(folder: Path) -> None:
    """Remove files and folders of `temporary_name` whose writer was killed; call it before the first write.

    Those of another process that is alive stay, also where it has only the same number. This process's own number is
    a dead one's: in a container every start may have the same.

    Args:
        folder: where they lie; it need not exist. Their names begin with a dot and end with a process number.
    """
    for path in folder.glob(".*"):
        match = _TEMPORARY.fullmatch(path.name)
        if match and (int(match[1]) == os.getpid() or not _alive(int(match[1]))):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # somebody else's
    return True


@contextmanager
def wrap_io_errors(path: Path) -> Iterator[None]:
    """Around writing a file of a run.

    Raises:
        UserError: it cannot be written; an error of `write` itself names no file.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({reason(error)}): free some space, or make its folder one that "
            "can be written, and run the same command again"
        ) from error


def can_be_folder(given: str, path: str | Path) -> None:
    """Check that no file is in the place of a folder to write, or of one above it.

    Raises:
        UserError: there is one; `given` is how the user named the folder.
    """
    path = Path(path)
    place = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not place.is_dir():
        raise UserError(f"{given}: {place} is no folder; name another output")


def checksum_of(paths: Iterable[Path]) -> int:
    """A CRC-32 over the bytes of files, one after the other."""
    code = 0
    for path in paths:
        with path.open("rb") as file:
            while piece := file.read(1 << 22):
                code = zlib.crc32(piece, code)
    return code


def damage(path: Path) -> str | None:
    """What is wrong with a file of torch.save: the CRC-32 of each of its parts is checked. None = nothing.

    torch.load itself does not notice a flipped bit among the numbers. A file that is whole and holds something that
    may not be loaded is not damaged.

    Raises:
        UserError: it cannot be read now, which says nothing about what is in it.
    """
    try:
        with zipfile.ZipFile(path) as file:
            part = file.testzip()
            # A flag that zipfile passes over; torch takes the part for a folder and leaves its numbers to chance.
            folders = [each.filename for each in file.infolist() if each.external_attr & 0x10]
        if folders:
            return f"its part {folders[0]} is marked as a folder"
        if part is not None:
            return f"its part {part} has another checksum"
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # its index, as torch reads it
    except pickle.UnpicklingError:
        return None
    except Exception as error:  # zipfile has no list of what it raises over damaged files
        if obstacle := _obstacle(error):
            raise UserError(
                f"{path} cannot be read ({reason(obstacle)}): see that it can, and run the same command again"
            ) from error
        return reason(error)
    return None


def _obstacle(error: BaseException) -> BaseException | None:
    """What kept a file from being read, be it the disk, memory or a limit; None where the content is to blame."""
    cause: BaseException | None = error
    while cause is not None:
        # A damaged index sends zipfile to places before the file's beginning: EINVAL.
        if isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno != errno.EINVAL):
            return cause
        cause = cause.__cause__ or cause.__context__
    # torch's own calls of the system fail with RuntimeError, as its reader does over a damaged index.
    return error if isinstance(error, RuntimeError) and str(error).startswith("unable to ") else None


def reason(error: BaseException) -> str:
    """An error in a few words, on one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error).partition(". ")[0][:200]
