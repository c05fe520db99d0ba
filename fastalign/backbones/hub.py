"""Published weights: a hub that cannot be reached is found out in seconds."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import get_session

from fastalign.utils.errors import first_line

_PATIENCE = 5.0
"""seconds for a connection, and for an answer"""


@contextmanager
def asked_once() -> Iterator[None]:
    """Around downloads from the hub: where it does not answer, only its cache is asked.

    The hub's own client tries every file again and again, for the better part of a minute.
    """
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _answers()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _answers() -> bool:
    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
    except Exception:  # those of the client, which changed from version to version
        return False
    return True


def reason(error: Exception) -> str:
    """Why a download failed, in a few words."""
    if isinstance(error, LocalEntryNotFoundError):
        return f"{constants.ENDPOINT} cannot be reached, and its cache does not have them"
    return first_line(error)
