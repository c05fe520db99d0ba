"""What every command does about bad input, alone and under torchrun."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastalign.engine import distributed
from fastalign.engine.distributed import LostConnection, connection_lost
from fastalign.engine.preemption import PREEMPTED, Preempted
from fastalign.engine.watchdog import BROKEN
from fastalign.errors import SharedError, UserError, of_the_system


def guarded(body: Callable[[], object]) -> int:
    """Run a command's body, and leave the ranks at its end.

    Returns:
        The exit code: 0, 2 for bad input, 70 where another rank was lost, 75 where the run saved and left as asked.
    """
    try:
        body()
    except UserError as error:
        return _refuse(str(error))
    except OSError as error:
        return _refuse(of_the_system(error))
    except Preempted as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"fastalign: {error}", file=sys.stderr, flush=True)
        return PREEMPTED
    except LostConnection as error:
        if str(error):
            print(f"fastalign: {error}", file=sys.stderr, flush=True)
        return BROKEN
    except RuntimeError as error:
        if not connection_lost(error):
            raise
        rank, reason = os.environ.get("RANK", "0"), str(error).splitlines()[0]
        print(
            f"fastalign: rank {rank}: lost the connection to another rank: run again to resume ({reason})",
            file=sys.stderr,
            flush=True,
        )
        return BROKEN
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
