"""Paths that users give, in configuration keys and arguments; and caches where there is no home folder."""

import argparse
import getpass
import os
import re
import tempfile
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from fastalign.utils.errors import UserError

_VARIABLE = re.compile(r"\$\{?(\w+)")


def place_caches() -> None:
    """For a container's user: torch._dynamo's import needs a name, and without a home Triton creates a folder `~`."""
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
