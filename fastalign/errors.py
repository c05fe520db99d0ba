"""The one exception for what a user got wrong; every command prints it as a single line and exits with 2."""


class UserError(Exception):
    """Bad input. The message is one line that names the argument, file or key, and the remedy."""


class SharedError(UserError):
    """Bad input that every rank knows of: the first one says it."""
