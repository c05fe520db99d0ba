"""What a run does about bad samples and bad numbers, once every rank knows of them."""

import json

from fastalign.data.bad_samples import FILE, BadSample, append_to_list, read_list, too_many
from fastalign.training.build import teacher_of
from fastalign.training.metrics import Terminal, drop_later_lines
from fastalign.training.preemption import StopReason
from fastalign.training.run import Run
from fastalign.training.status import StepStatus
from fastalign.utils.errors import SharedError, on_one_line
from fastalign.utils.files import wrap_io_errors

NONFINITE = "nonfinite.jsonl"
VALIDATION_FILE = f"validation_{FILE}"
MOST_SKIPPED = 10
"""updates left out one after the other, after which a run ends: its weights no longer move"""


def react(run: Run, terminal: Terminal, *, everything: bool = False) -> tuple[StopReason, bool]:
    """Act on what the ranks told one another; a collective where something is wrong.

    Args:
        run: the run.
        terminal: where it is told.
        everything: of the newest update too, which waits for the device.

    Returns:
        Why the run is to stop, and whether a checkpoint is overdue.

    Raises:
        SharedError: bad numbers or samples, too many or not to be borne; on every rank.
    """
    stop, overdue = StopReason.NONE, False
    for seen in run.status.read(everything=everything):
        stop, overdue = stop or seen.stop, overdue or seen.overdue
        if seen.bad:
            bad_samples(run, seen, terminal)
        if seen.skipped:
            bad_numbers(run, seen, terminal)
        else:
            run.skipped_in_a_row = 0
    return stop, overdue


def bad_samples(run: Run, seen: StepStatus, terminal: Terminal) -> None:
    """Tell every rank what each found, write it down, and stop the run where it is too much."""
    found = [sample for part in run.world.gather(seen.found) for sample in part]
    new = run.known_bad(found)
    if not new:
        return  # told by the update before this one
    write_down(run, FILE, new)
    first, drawn = new[0], seen.step * run.config.optim.batch_size
    more = f" and {len(new) - 1} more" if len(new) > 1 else ""
    count = f"{len(run.bad)} bad samples in {drawn} images"
    if too_many(len(run.bad), drawn, run.config.faults["bad_samples"]):
        raise SharedError(
            f"{count}, more than faults.bad_samples={run.config.faults['bad_samples']:g} allows; the newest is "
            f"{first.name!r} ({first.reason}); all are in {run.folder / FILE}: mend the data set, or allow more"
        )
    terminal.say(on_one_line(f"step {seen.step}: left out {first.name!r} ({first.reason}){more}; {count}"))


def write_down(run: Run, name: str, samples: list[BadSample]) -> None:
    """Add to a list in the run folder what is not there yet; on the first rank.

    Raises:
        UserError: the list cannot be written.
    """
    path = run.folder / name
    if run.world.main and samples:
        if name not in run.listed:
            run.listed[name] = {sample.name for sample in read_list(path)} if path.exists() else set()
        with wrap_io_errors(path):
            append_to_list(path, [sample for sample in samples if sample.name not in run.listed[name]])
        run.listed[name] |= {sample.name for sample in samples}


def bad_validation_samples(run: Run, terminal: Terminal) -> None:
    """Write down what the validation set has lost so far; a collective."""
    found = [sample for part in run.world.gather(tuple(run.val.bad.found.values())) for sample in part]
    if found:
        write_down(run, VALIDATION_FILE, found)
        terminal.say(f"validation leaves out {len(found)} bad samples, see {run.folder / VALIDATION_FILE}")


def look_back(run: Run, terminal: Terminal) -> None:
    """At the start: what was written down and will come again is dropped; told is what is wrong already.

    That is a teacher that has learned nothing, and what cannot be read, which is listed too.
    """
    if not run.world.main:
        return
    if teacher_of(run.config)[1] == "random":
        key = "teacher.weights" if run.config.teacher.weights else "student.weights"
        terminal.say(
            f"warning: {key}=random: the teacher has random weights, so that the student learns nothing of use; set "
            "it to pretrained, a weights file or a run folder"
        )
    if (run.folder / NONFINITE).exists():
        drop_later_lines(run.folder / NONFINITE, run.step)
    for loader, name in ((run.train, FILE), (run.val, VALIDATION_FILE)):
        damaged = loader.source.damaged if loader is not None else ()
        for part, reason in damaged:
            terminal.say(on_one_line(f"the data set is incomplete: {part!r}, {reason}"))
        write_down(run, name, [BadSample(None, part, reason) for part, reason in damaged])


def bad_numbers(run: Run, seen: StepStatus, terminal: Terminal) -> None:
    """Write down the samples of an update that was left out, and stop the run where that is asked for."""
    guilty = run.world.rank in seen.ranks or not seen.ranks
    source = run.train.source
    names = [source.portable_name(int(i)) for i in seen.ids] if guilty else []
    line = {"step": seen.step, "rank": run.world.rank, "ids": seen.ids.tolist(), "names": names}
    lines = [line for line in run.world.gather(line) if line["names"]]
    path = run.folder / NONFINITE
    if run.world.main:
        with wrap_io_errors(path), path.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    ranks = ", ".join(map(str, seen.ranks))
    what = f"the loss of rank {ranks}" if len(seen.ranks) == 1 else f"the losses of ranks {ranks}"
    what = f"{what if seen.ranks else 'the gradient'} at step {seen.step}: not finite"
    where = f"the samples are in {path}"
    remedy = "look at them; or lower optim.lr, set optim.clip or efficiency.precision=fp32, with resume=force"
    if run.config.faults["nonfinite"] == "stop":
        raise SharedError(
            f"{what}; {where}; the weights were left as they were, and the last checkpoint is from before: {remedy}, "
            "or faults.nonfinite=skip to leave such updates out"
        )
    run.skipped_in_a_row += 1
    if run.skipped_in_a_row >= MOST_SKIPPED:
        raise SharedError(f"{what}, the {MOST_SKIPPED}th update left out in a row; {where}: {remedy}")
    terminal.say(f"{what}: this update was left out; {where}")
