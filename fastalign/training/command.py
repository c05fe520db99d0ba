"""What every command does about errors and signals, alone and under torchrun: one line and an exit code."""

import argparse
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastalign.config import Config
from fastalign.training import distributed
from fastalign.training.hang import RANK_FAILED
from fastalign.training.preemption import INTERRUPTED, Preempted
from fastalign.utils.errors import SharedError, UserError, describe, first_line
from fastalign.utils.paths import path_argument

HELP = """
examples:
  fastalign train clip-vit-b data.train=/data/train data.val=/data/val
  fastalign train student.name=vit_base_patch16_dinov3.lvd1689m data.train=/data/train output=runs/mine --dry-run

sections of keys (--print-config prints every key, its values and what it does):
"""
HELP += textwrap.fill(", ".join(Config.model_fields), 78, initial_indent="  ", subsequent_indent="  ")


def run_command(body: Callable[[], object]) -> int:
    """Run a command's body, and leave the process group.

    Returns the exit code: 0; 2 for bad input; 70 if another rank was lost; 75 if the run was asked to stop and saved;
    130 after Ctrl-C.
    """
    rank = os.environ.get("RANK", "0")
    try:
        try:
            body()
            return 0
        except (UserError, OSError) as error:
            if os.environ.get("LOCAL_RANK", "0") == "0":  # the first rank of each machine
                return _exit_code(2, describe(error))
            time.sleep(3)  # torchrun stops every rank when one has ended: let the first one print
            return 2
        except Preempted as error:
            return _exit_code(error.code, str(error) if rank == "0" else "")
        except RuntimeError as error:
            if not distributed.connection_lost(error):
                raise
            message = f"rank {rank}: lost the connection to another rank: run again to resume"
            return _exit_code(RANK_FAILED, f"{message} ({first_line(error)})")
        finally:
            distributed.stop()
    except KeyboardInterrupt:
        return _exit_code(INTERRUPTED, "interrupted" if rank == "0" else "")


def _exit_code(code: int, message: str) -> int:
    if message:
        print(f"fastalign: {message}", file=sys.stderr, flush=True)
    return code


@contextmanager
def report_rank_error(rank: int) -> Iterator[None]:
    """Print a `UserError` that only one rank may have, if `run_command` prints nothing on this rank."""
    try:
        yield
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0" and not isinstance(error, SharedError):
            print(f"fastalign: rank {rank}: {error}", file=sys.stderr)
        raise


def train_parser() -> argparse.ArgumentParser:
    """The options of `fastalign train`."""
    parser = argparse.ArgumentParser(
        prog="fastalign train",
        description="Align a backbone with MaskEmbed.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, about = parser.add_argument, "a name (`fastalign recipes` lists them) or a file, and keys to change"
    add(
        "given",
        nargs="*",
        metavar="RECIPE section.key=value",
        help=f"{about}; without a recipe, of the defaults",
    )
    add("--print-config", action="store_true", help="print the resolved configuration and stop")
    about = "take a few updates on synthetic images; print memory, speed and the time of the whole run"
    add("--dry-run", action="store_true", help=about)
    about = "a YAML file of the authors' code, instead of a recipe"
    add("--reference-config", type=path_argument, metavar="FILE", help=about)
    about = "GPUs that FILE's batch is for (torchrun's, else 4)"
    add("--world-size", type=int, metavar="N", help=about)
    return parser
