"""What every command does about bad input, alone and under torchrun."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastalign.training import distributed
from fastalign.training.distributed import connection_lost
from fastalign.training.hang import RANK_FAILED
from fastalign.training.preemption import INTERRUPTED, Preempted
from fastalign.utils.errors import SharedError, UserError, describe_os_error


def run_command(body: Callable[[], object]) -> int:
    """Run a command's body, and leave the ranks at its end.

    Returns:
        The exit code: 0, 2 for bad input, 70 where another rank was lost, 75 where the run saved and left as asked,
        130 where it was interrupted (and saved, where there was something to save).
    """
    rank = os.environ.get("RANK", "0")
    try:
        return _outcome(body, rank)
    except KeyboardInterrupt:  # wherever it comes, also while the ranks are left
        return _leave(INTERRUPTED, "interrupted" if rank == "0" else "")


def _outcome(body: Callable[[], object], rank: str) -> int:
    try:
        body()
    except UserError as error:
        return _refuse(str(error))
    except OSError as error:
        return _refuse(describe_os_error(error))
    except Preempted as error:
        return _leave(error.code, str(error) if rank == "0" else "")
    except RuntimeError as error:
        if not connection_lost(error):
            raise
        first = str(error).splitlines()[0]
        line = f"rank {rank}: lost the connection to another rank: run again to resume ({first})"
        return _leave(RANK_FAILED, line)
    finally:
        distributed.stop()
    return 0


def _refuse(message: str) -> int:
    """Bad input: of several ranks, each machine's first says it."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        return _leave(2, message)
    time.sleep(3)  # torchrun ends every rank when the first one ends: let the line be printed
    return 2


def _leave(code: int, message: str) -> int:
    """One line for the user, none where the message is empty. Returns the exit code."""
    if message:
        print(f"fastalign: {message}", file=sys.stderr, flush=True)
    return code


@contextmanager
def report_rank_error(rank: int) -> Iterator[None]:
    """Around what may go wrong on one rank only: ranks that `run_command` keeps silent say it here."""
    try:
        yield
    except SharedError:
        raise
    except UserError as error:
        if int(os.environ.get("LOCAL_RANK", 0)):
            print(f"fastalign: rank {rank}: {error}", file=sys.stderr)
        raise
