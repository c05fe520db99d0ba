"""What every command does about bad input, alone and under torchrun."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastalign.engine import distributed
from fastalign.errors import SharedError, UserError


def guarded(body: Callable[[], object]) -> int:
    """Run a command's body, and leave the ranks at its end. Returns the exit code: 0, or 2 for bad input."""
    try:
        body()
    except UserError as error:
        return _refuse(str(error))
    except OSError as error:
        return _refuse(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    finally:
        distributed.stop()
    return 0


def _refuse(message: str) -> int:
    """One line for the user; of several ranks, each machine's first says it. Returns the exit code."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print(f"fastalign: {message}", file=sys.stderr, flush=True)
    else:
        time.sleep(3)  # torchrun ends every rank when the first one ends: let the line be printed
    return 2


@contextmanager
def telling(rank: int) -> Iterator[None]:
    """Around what may go wrong on one rank only: ranks that `guarded` keeps silent say it here."""
    try:
        yield
    except SharedError:
        raise
    except UserError as error:
        if int(os.environ.get("LOCAL_RANK", 0)):
            print(f"fastalign: rank {rank}: {error}", file=sys.stderr)
        raise
