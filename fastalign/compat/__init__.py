"""The authors' package `locality_alignment` and their scripts on our parts."""

from fastalign.utils.errors import UserError


class ArgumentError(UserError, ValueError):
    """A wrong argument, as callers of the authors' names expect it; one line under `run`."""
