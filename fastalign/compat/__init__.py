"""The authors' names on our parts: their package `locality_alignment`, their scripts and their YAML files."""

from fastalign.utils.errors import UserError


class ArgumentError(UserError, ValueError):
    """A wrong argument, as callers of the authors' names expect it; one line under `run`."""
