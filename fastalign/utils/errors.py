"""Errors for users: every command prints a `UserError` as one line and exits with code 2."""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path

_LONGEST = 2000
_CONTROL = re.compile("[\x00-\x1f\x7f\x85\u2028\u2029]")


def on_one_line(text: str) -> str:
    """The text with line breaks and control characters escaped, cut at 2000 characters."""
    text = _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def describe(error: Exception) -> str:
    """The message of an error for the user; an OSError's includes its file, if any."""
    filename = getattr(error, "filename", None)
    if isinstance(error, FileExistsError | NotADirectoryError):
        place = next(place for place in (Path(filename), *Path(filename).parents) if place.exists())
        return f"{place} is not a directory; name another output"
    return f"{filename}: {error.strerror}" if filename else str(error)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class if the message is empty."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def unknown(what: str, name: object, names: Iterable[str]) -> str:
    """The message for a name that is not among `names`, with the nearest of them."""
    (nearest,) = difflib.get_close_matches(str(name), names, n=1, cutoff=0.0)
    return f"unknown {what} {name}; the nearest is {nearest}"


class UserError(Exception):
    """Bad input. The message is one line: the argument, file or key, and what to do."""

    def __init__(self, message: str):
        super().__init__(on_one_line(message))


class SharedError(UserError):
    """Bad input that every rank knows of; only rank 0 prints it."""
