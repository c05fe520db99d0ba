"""Bad input to the authors' names: the exceptions that their callers know, and one line under `run`."""

from fastalign.utils.errors import UserError


class ArgumentError(UserError, ValueError):
    """An argument that cannot be."""


class NoCheckpointError(UserError, FileNotFoundError):
    """There is no such file."""


class NumpyCheckpointError(UserError, NotImplementedError):
    """A kind of file that is not read."""
