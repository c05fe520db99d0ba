"""Paths given by users, atomic writes, checksums, and environment variables for users in containers."""

import argparse
import errno
import fcntl
import getpass
import os
import re
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, BinaryIO

import safetensors.torch
from pydantic import AfterValidator
from torch import Tensor

from fastalign.utils.errors import UserError, first_line

_VARIABLE = re.compile(r"\$\{?(\w+)")
_TEMPORARY = re.compile(r"\..+\.(\d+)$")


def set_container_defaults() -> None:
    """For users in containers: torch._dynamo needs a user name, and without a home Triton creates a folder `~`."""
    try:
        getpass.getuser()
    except (KeyError, OSError):  # OSError from Python 3.13 on
        os.environ["USER"] = str(os.getuid())
    if os.path.expanduser("~") == "~":  # noqa: PTH111, which raises
        os.environ.setdefault("TRITON_HOME", f"{tempfile.gettempdir()}/fastalign-{os.getuid()}")


def user_path(text: str | Path) -> str:
    """A path with `~`, `~name`, `$NAME` and `${NAME}` expanded; anything else (a timm name) is returned as it is."""
    text = os.fspath(text)
    found = os.path.expanduser(text)  # noqa: PTH111, which raises instead of leaving the text as it is
    if found.startswith("~"):
        raise UserError(f"{text}: the home folder of {found.split('/')[0]} is not known; write the path out")
    found = os.path.expandvars(found)
    if missing := _VARIABLE.search(found):
        raise UserError(f"{text}: the environment variable {missing[1]} is not set; write the path out")
    return found


class _BadPath(argparse.ArgumentTypeError, ValueError):
    """For argparse and for pydantic."""


def path_argument(text: str) -> str:
    """`user_path` as the `type` of an argparse argument and as a validator of pydantic."""
    try:
        return user_path(text)
    except UserError as error:
        raise _BadPath(str(error)) from None


UserPath = Annotated[str, AfterValidator(path_argument)]
"""The type of a configuration key that may hold a path."""


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file under a temporary name, flush it and rename it, else UserError; its mode follows the umask."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    with wrap_io_errors(path):
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
    """Write contiguous tensors as a safetensors file, atomically; the library's own writer gives it mode 0600."""
    content = safetensors.torch.save(tensors, {"format": "pt", **metadata})
    write_atomically(path, lambda file: file.write(content))


def temporary_name(path: Path) -> Path:
    """The temporary name under which this process writes `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def flush_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, if the file system supports it."""
    handle = os.open(folder, os.O_RDONLY)
    with suppress(OSError):
        os.fsync(handle)
    os.close(handle)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of killed processes; call it before the first write."""
    # Files with this process's own id are leftovers too: in a container every start may have the same id.
    for path in filter(Path.is_file, folder.glob(".*")):
        match = _TEMPORARY.fullmatch(path.name)
        if match and (int(match[1]) == os.getpid() or not Path("/proc", match[1]).exists()):
            path.unlink(missing_ok=True)


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Make a folder, and keep other processes out of it that call this; UserError if one is in it."""
    with wrap_io_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder} is in use: end the other run, or name another output") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)


@contextmanager
def wrap_io_errors(path: Path) -> Iterator[None]:
    """Turn an OSError while writing a file of a run into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        remedy = "free some space, or make its directory writable, and run the same command again"
        raise UserError(f"{path} cannot be written ({reason(error)}): {remedy}") from error


def checksum_of(paths: Iterable[Path]) -> int:
    """A CRC-32 over the bytes of files, one after the other."""
    code = 0
    for path in paths:
        with path.open("rb") as file:
            while piece := file.read(1 << 22):
                code = zlib.crc32(piece, code)
    return code


def system_error(error: BaseException | None) -> OSError | MemoryError | None:
    """The OSError or MemoryError that caused an error; None if the file's content is wrong."""
    while error is not None:
        # A damaged index makes zipfile seek before the file's beginning: EINVAL.
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno != errno.EINVAL):
            return error
        error = error.__cause__ or error.__context__
    return None


def reason(error: BaseException) -> str:
    """An error in a few words."""
    return getattr(error, "strerror", None) or first_line(error).partition(". ")[0][:200]
