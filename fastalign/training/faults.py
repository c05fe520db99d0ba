"""Handling of bad samples and of non-finite losses and gradients, once every rank knows of them."""

import json

from fastalign.data.pipeline import FILE, BadSample, append_to_list, read_list, too_many
from fastalign.training.build import teacher_of
from fastalign.training.command import StopReason
from fastalign.training.metrics import drop_later_lines
from fastalign.training.reporter import Reporter
from fastalign.training.run import Run
from fastalign.training.update import StepStatus
from fastalign.utils.errors import SharedError, on_one_line
from fastalign.utils.files import wrap_io_errors

NONFINITE = "nonfinite.jsonl"
VALIDATION_FILE = f"validation_{FILE}"
MAX_SKIPPED = 10  # updates in a row, after which a run ends


def prepare_logs(run: Run, reporter: Reporter) -> None:
    """At the start, on rank 0: drop lines that will be written again, warn of a random teacher, list damage."""
    if not run.world.main:
        return
    if teacher_of(run.config)[1] == "random":
        key = "teacher.weights" if run.config.teacher.weights else "student.weights"
        reporter.say(f"warning: {key}=random: the teacher has random weights, so nothing useful is learned")
    if (run.folder / NONFINITE).exists():
        drop_later_lines(run.folder / NONFINITE, run.state.step)
    for loader, name in ((run.train, FILE), (run.val, VALIDATION_FILE)):
        damaged = loader.source.damaged if loader is not None else ()
        for part, reason in damaged:
            reporter.say(on_one_line(f"the data set is incomplete: {part!r}, {reason}"))
        record_bad_samples(run, name, [BadSample(None, part, reason) for part, reason in damaged])


def handle_status(run: Run, reporter: Reporter, *, everything: bool) -> tuple[StopReason, bool]:
    """Act on the statuses that are due. With `everything`, or if one asks for a checkpoint, wait for all of them.

    Returns why the run must stop, and whether a checkpoint is overdue. SharedError: too many bad samples or skips.
    """
    statuses = run.status.read(everything=everything)
    if any(status.stop or status.overdue for status in statuses):
        statuses += run.status.read(everything=True)
    for status in statuses:
        if status.bad:
            _handle_bad_samples(run, status, reporter)
        if status.skipped:
            _handle_skipped(run, status, reporter)
        else:
            run.state.skipped_in_a_row = 0
    stop = next((status.stop for status in statuses if status.stop), StopReason.NONE)
    return stop, any(status.overdue for status in statuses)


def _handle_bad_samples(run: Run, status: StepStatus, reporter: Reporter) -> None:
    """Gather the bad samples of all ranks, record the new ones, and end the run if there are too many."""
    known, limit = run.state.bad, run.config.faults.bad_samples
    found = [sample for part in run.world.gather(status.found) for sample in part]
    new = {sample.id: sample for sample in found if sample.id not in known}
    if not new:
        return  # found by the previous update too
    known.update(new)
    run.train.bad.found.update(new)
    record_bad_samples(run, FILE, list(new.values()))
    first, drawn = next(iter(new.values())), status.step * run.config.optim.batch_size
    count = f"{len(known)} bad samples in {drawn} images"
    if too_many(len(known), drawn, limit):
        newest = f"the newest is {first.name!r} ({first.reason}); all are in {run.folder / FILE}"
        raise SharedError(
            f"{count}, more than faults.bad_samples={limit:g} allows; {newest}: repair the data set"
        )
    more = f" and {len(new) - 1} more" if len(new) > 1 else ""
    reporter.say(on_one_line(f"step {status.step}: left out {first.name!r} ({first.reason}){more}; {count}"))


def record_bad_samples(run: Run, name: str, samples: list[BadSample]) -> None:
    """Append new samples to a list in the run folder, on rank 0."""
    path = run.folder / name
    if run.world.main and samples:
        listed = {sample.name for sample in read_list(path)} if path.exists() else set()
        with wrap_io_errors(path):
            append_to_list(path, [sample for sample in samples if sample.name not in listed])


def report_bad_validation_samples(run: Run, reporter: Reporter) -> None:
    """Record the bad samples of the validation set so far; a collective."""
    found = [sample for part in run.world.gather(tuple(run.val.bad.found.values())) for sample in part]
    if found:
        record_bad_samples(run, VALIDATION_FILE, found)
        reporter.say(f"validation leaves out {len(found)} bad samples, see {run.folder / VALIDATION_FILE}")


def _handle_skipped(run: Run, status: StepStatus, reporter: Reporter) -> None:
    """Record the samples of a skipped update; end the run if `faults.nonfinite=stop` or after too many in a row."""
    path, names = run.folder / NONFINITE, []
    if run.world.rank in status.ranks or not status.ranks:
        names = [run.train.source.name(int(i)) for i in status.ids]
    line = {"step": status.step, "rank": run.world.rank, "ids": status.ids.tolist(), "names": names}
    lines = [line for line in run.world.gather(line) if line["names"]]
    if run.world.main:
        with wrap_io_errors(path), path.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    what = f"the loss of rank {', '.join(map(str, status.ranks))}" if status.ranks else "the gradient"
    what, where = f"{what} at step {status.step}: not finite", f"the samples are in {path}"
    remedy = "check them; or lower optim.lr, set optim.clip or efficiency.precision=fp32, with resume=force"
    if run.config.faults.nonfinite == "stop":
        raise SharedError(
            f"{what}; {where}; the weights did not change: {remedy}, or set faults.nonfinite=skip"
        )
    run.state.skipped_in_a_row += 1
    if run.state.skipped_in_a_row >= MAX_SKIPPED:
        raise SharedError(f"{what}, the {MAX_SKIPPED}th skipped update in a row; {where}: {remedy}")
    reporter.say(f"{what}: this update was skipped; {where}")
