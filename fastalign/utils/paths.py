"""Paths that a user gives: one function for all of them, a type for configuration keys and one for arguments.

And the home folder, which a container may not have.
"""

import argparse
import getpass
import os
import re
import tempfile
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from fastalign.utils.errors import UserError

# At the beginning, or behind the kind of a data set, as in `coco:~/coco`.
_HOME = re.compile(r"((?:[\w-]+:)?)(~[^/]*)")
_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})")


def home_folder() -> str | None:
    """The user's; None where neither HOME nor the list of users tells, as in a container that runs as a number."""
    home = os.path.expanduser("~")  # noqa: PTH111, it tells by leaving the text as it is
    return None if home == "~" else home


def place_caches() -> None:
    """In a container that runs as a number: tell compilers whose caches they keep, and where.

    The import of torch's, which timm needs, asks for the user's name and ends with a traceback; Triton would make a
    folder called `~`.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):  # OSError from Python 3.13 on
        os.environ["USER"] = str(os.getuid())
    if home_folder() is None:
        os.environ.setdefault("TRITON_HOME", f"{tempfile.gettempdir()}/fastalign-{os.getuid()}")


def user_path(text: str | Path) -> str:
    """A path as a shell reads it: `~` and `~name` are home folders, `$NAME` and `${NAME}` the environment's.

    What stands for something other than a path (`random`, `synthetic:100`, a timm name) comes back as it is.

    Raises:
        UserError: no such user, no home folder, or a variable that is not set: a folder of that name would be
            made, or looked for, instead of what was meant.
    """
    text, home = os.fspath(text), ""
    if match := _HOME.match(text):
        home = match[1] + os.path.expanduser(match[2])  # noqa: PTH111, it tells when there is no home folder
        if home == match[0]:
            raise UserError(f"{text}: the home folder of {match[2]} is not known; write the path out")

    def value(found: re.Match) -> str:
        name = found[1] or found[2]
        if name not in os.environ:
            raise UserError(
                f"{text}: the environment variable {name} is not set; set it, or write the path out"
            )
        return os.environ[name]

    return home + _VARIABLE.sub(value, text[match.end() if match else 0 :])


def path_argument(text: str) -> str:
    """`user_path` as the `type` of an argument: argparse names the argument in front of what is wrong."""
    try:
        return user_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _path_key(text: str) -> str:
    try:
        return user_path(text)
    except UserError as error:
        raise ValueError(str(error)) from None


UserPath = Annotated[str, AfterValidator(_path_key)]
"""The type of a configuration key that may hold a path: pydantic names the key in front of what is wrong."""
