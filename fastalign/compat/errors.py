"""Bad input to the authors' names: exceptions that their callers expect, printed in one line under `run`."""

from fastalign.utils.errors import UserError


class ArgumentError(UserError, ValueError):
    """A wrong argument."""


class NoCheckpointError(UserError, FileNotFoundError):
    """No such file."""


class NumpyCheckpointError(UserError, NotImplementedError):
    """A NumPy file, which is not supported."""
