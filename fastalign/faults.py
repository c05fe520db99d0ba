"""What a run does about bad numbers, once every rank knows of them."""

import json

from fastalign.engine.metrics import Terminal
from fastalign.engine.status import Seen
from fastalign.errors import SharedError
from fastalign.run import Run

NONFINITE = "nonfinite.jsonl"
MOST_SKIPPED = 10
"""updates left out one after the other, after which a run ends: its weights no longer move"""


def react(run: Run, terminal: Terminal, *, everything: bool = False) -> bool:
    """Act on what the ranks told one another; a collective where something is wrong.

    Args:
        run: the run.
        terminal: where it is told.
        everything: of the newest update too, which waits for the device.

    Returns:
        Whether some rank was told to stop.

    Raises:
        SharedError: bad numbers, and the run is to stop at them, or there were too many; on every rank.
    """
    stop = False
    for seen in run.status.read(everything=everything):
        stop |= seen.stop
        if seen.skipped:
            bad_numbers(run, seen, terminal)
        else:
            run.skipped_in_a_row = 0
    return stop


def bad_numbers(run: Run, seen: Seen, terminal: Terminal) -> None:
    """Write down the samples of an update that was left out, and stop the run where that is asked for."""
    guilty = run.world.rank in seen.ranks or not seen.ranks
    source = run.train.source
    names = [source.portable_name(int(i)) for i in seen.ids] if guilty else []
    line = {"step": seen.step, "rank": run.world.rank, "ids": seen.ids.tolist(), "names": names}
    lines = [line for line in run.world.gather(line) if line["names"]]
    if run.world.main:
        with (run.folder / NONFINITE).open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    ranks = ", ".join(map(str, seen.ranks))
    what = f"the loss of rank {ranks}" if len(seen.ranks) == 1 else f"the losses of ranks {ranks}"
    what = f"{what if seen.ranks else 'the gradient'} at step {seen.step}: not finite"
    where = f"the samples are in {run.folder / NONFINITE}"
    remedy = "look at them, lower optim.lr, set optim.clip, or efficiency.precision=fp32"
    if run.config.faults["nonfinite"] == "stop":
        raise SharedError(
            f"{what}; {where}; the weights were left as they were, and the last checkpoint is from before: {remedy}, "
            "or faults.nonfinite=skip to leave such updates out"
        )
    run.skipped_in_a_row += 1
    if run.skipped_in_a_row >= MOST_SKIPPED:
        raise SharedError(f"{what}, the {MOST_SKIPPED}th update left out in a row; {where}: {remedy}")
    terminal.say(f"{what}: this update was left out; {where}")
