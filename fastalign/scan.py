"""Checks every image of a data set: ``python -m fastalign.scan DATA [--output quarantine.jsonl]``.

The verdicts are those of training: the header check, then DALI's decoder, on the CPU. The list that it writes is what
`faults.quarantine` reads. The exit code is 0 whether or not bad images were listed, and 2 for bad input.
"""

import argparse
import multiprocessing
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from fastalign.data.bad_samples import BadSample, BadSamples, to_line
from fastalign.data.fetch import Fetcher
from fastalign.data.pipeline import Examiner, load_dali
from fastalign.data.source import SyntheticSource
from fastalign.data.sources import open_source
from fastalign.training.command import run_command
from fastalign.utils.errors import UserError
from fastalign.utils.files import temporary_name, write_atomically
from fastalign.utils.paths import path_argument

CHUNK = 64
"""Images a task."""
_TOLD_EVERY = 0.05
_worker: tuple[Fetcher, Examiner] | None = None


def _start(data: str) -> None:
    """In each process."""
    global _worker
    fetcher = Fetcher(open_source(data, damaged=True), BadSamples(), replace=False)
    _worker = (fetcher, Examiner(torch.device("cpu")))


def _check(first: int, last: int) -> list[BadSample]:
    fetcher, examiner = _worker
    return [
        sample
        for index in range(first, last)
        for sample in fetcher.settle(fetcher.fetch(index), examiner.reason).bad
    ]


def verdicts(data: str, total: int, workers: int) -> Iterator[tuple[int, list[BadSample]]]:
    """Checks a data set in parallel processes; a few tasks each are under way, whatever its size.

    Args:
        data: see `open_source`.
        total: images in it.
        workers: processes.

    Yields:
        How many images were checked, and those of them that are bad, in no order.

    Raises:
        UserError: a process died; the images that it may have been are named.
    """
    # A forked process would share the parent's threads' locks: DALI and torch have threads.
    context = multiprocessing.get_context("spawn")
    waiting, first = {}, 0
    with ProcessPoolExecutor(workers, context, _start, (data,)) as pool:
        while first < total or waiting:
            while first < total and len(waiting) < 3 * workers:
                last = min(first + CHUNK, total)
                waiting[pool.submit(_check, first, last)] = first, last
                first = last
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for task in done:
                begin, end = waiting.pop(task)
                try:
                    yield end - begin, task.result()
                except BrokenProcessPool:
                    raise UserError(
                        f"a process died while images {begin} to {end - 1} or ones near them were decoded; "
                        "is there memory for so many? try --workers 1"
                    ) from None


def scan(data: str, workers: int, console: Console) -> tuple[int, list[BadSample]]:
    """Checks a data set with a progress bar, or a line now and then where there is no terminal.

    Args:
        data: see `open_source`.
        workers: processes.
        console: to tell on.

    Returns:
        How many images there are, and the bad ones in source order; what else cannot be read comes first.

    Raises:
        UserError: nothing usable there.
    """
    source = open_source(data, damaged=True)
    if isinstance(source, SyntheticSource):
        raise UserError(f"{data} is made on the device: there is no file to check")
    load_dali()
    total, seen, told = len(source), 0, 0.0
    bad: list[BadSample] = []
    parts = [BadSample(None, name, reason) for name, reason in source.damaged]
    source.close()
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("checking", total=total)
        for count, found in verdicts(data, total, min(workers, -(-total // CHUNK))):
            seen += count
            bad += found
            bar.update(task, advance=count)
            if not console.is_terminal and seen / total >= told + _TOLD_EVERY:
                told = seen / total
                print(f"{seen} of {total} images checked, {len(bad)} bad", file=console.file, flush=True)
    return total, parts + sorted(bad, key=lambda sample: sample.id)


def summary(data: str, total: int, bad: list[BadSample], output: Path | None) -> list[str]:
    """The lines at the end: how many, why, where they are listed."""
    images = [sample for sample in bad if sample.id is not None]
    parts = [sample for sample in bad if sample.id is None]
    lines = [f"{data}: {total} images, {len(images)} bad ({len(images) / total:.2%})"]
    kinds: dict[str, list[BadSample]] = {}
    for sample in images:
        # Sizes differ from image to image: reasons are counted by their words.
        kinds.setdefault(re.sub(r"\d+", "N", sample.reason), []).append(sample)
    for alike in sorted(kinds.values(), key=len, reverse=True):
        lines.append(f"  {len(alike)} x {alike[0].reason} (such as {alike[0].name!r})")
    lines += [f"  incomplete: {sample.name!r}, {sample.reason}" for sample in parts]
    if output:
        lines.append(f"quarantine list: {output}; train with faults.quarantine={output}")
    elif bad:
        lines.append("add --output quarantine.jsonl for the list that faults.quarantine reads")
    return lines


def _try(output: Path) -> None:
    """Refuse a list that could not be written, before hours of checking and not after."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary_name(output).touch()
        temporary_name(output).unlink()
    except OSError as error:
        raise UserError(
            f"--output {output}: it cannot be written ({error.strerror}); name another place"
        ) from error


def _run(options: argparse.Namespace) -> None:
    if options.workers < 1:
        raise UserError(f"--workers {options.workers}: it must be at least 1")
    output = Path(options.output) if options.output else None
    if output and output.is_dir():
        raise UserError(
            f"--output {output}: it is a folder; name a file, such as {output / 'quarantine.jsonl'}"
        )
    if output:
        _try(output)
    total, bad = scan(options.data, options.workers, Console(stderr=True))
    if output:
        text = b"".join(to_line(sample) for sample in bad)
        write_atomically(output, lambda file: file.write(text))
    print("\n".join(summary(options.data, total, bad, output)))


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns the exit code: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m fastalign.scan", description="Check every image of a data set, as training would."
    )
    parser.add_argument(
        "data", type=path_argument, help="a folder of images, tar shards or a pattern of them, as data.train"
    )
    parser.add_argument(
        "--output", type=path_argument, metavar="FILE", help="write the bad ones here, for faults.quarantine"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes (one a core)",
    )
    options = parser.parse_args(arguments)
    return run_command(lambda: _run(options))


if __name__ == "__main__":
    sys.exit(main())
