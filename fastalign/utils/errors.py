"""The one exception for what a user got wrong; every command prints it as a single line and exits with 2."""

import re

_LONGEST = 2000
_BREAKS = re.compile("[\x00-\x1f\x7f\x85\u2028\u2029]")


def on_one_line(text: str) -> str:
    """A text that quotes anything, fit for one line of a terminal: line breaks and control characters are escaped."""
    text = _BREAKS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def describe_os_error(error: OSError) -> str:
    """An error of the operating system for a user: the file, where it names one, and what is wrong with it."""
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)


def first_line(error: BaseException) -> str:
    """What an error says, its first line; its class where it says nothing."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


class UserError(Exception):
    """Bad input. The message is one line that names the argument, file or key, and the remedy."""

    def __init__(self, message: str):
        super().__init__(on_one_line(message))


class SharedError(UserError):
    """Bad input that every rank knows of: the first one says it."""
