"""What a run reports: metrics to files and services, and progress to the terminal."""

import importlib
import json
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from fastalign.training.messages import clock, duration
from fastalign.training.metrics import CompileStats, Speed, SpikeDetector, drop_later_lines, plain_number
from fastalign.utils.errors import UserError
from fastalign.utils.files import wrap_io_errors

_Item = TypeVar("_Item")
LINE_SECONDS = 10
"""Between two lines of progress where there is no terminal, at least."""


class Reporter:
    """Metrics, a line of JSON per step, and progress: a bar on a terminal, plain lines elsewhere.

    Values stay on the device until they are flushed, so that the host never waits for a step.

    Args:
        folder: the run folder; lines go to its `metrics.jsonl`.
        speed: measures training lines.
        step, evaluated: of `drop_later_lines`: lines written before an interruption are dropped.
        total: the last step.
        main: whether this rank reports; others are silent.
        sinks: also log to "tensorboard" (events in `folder`) and "wandb:PROJECT".
    """

    def __init__(
        self,
        folder: Path,
        speed: Speed | None = None,
        *,
        step: int = 0,
        evaluated: bool = True,
        total: int = 0,
        main: bool = True,
        sinks: Sequence[str] = (),
    ):
        self.main, self.total, self.first, self.speed = main, total, step, speed
        self._pending: list[dict] = []
        self._bar, self._spikes, self._compile_stats = None, SpikeDetector(), CompileStats()
        self._shown, self._announced = 0.0, False
        self.start_clock()
        if not main:
            return
        self._path = folder / "metrics.jsonl"
        if self._path.exists():
            drop_later_lines(self._path, step or -1, evaluated=evaluated)
        self._file = self._path.open("a")
        self._sinks = [_open_sink(sink, folder, step or -1) for sink in sinks]
        if sys.stderr.isatty():
            # Fits 80 columns: bar, steps, figures, time left.
            columns = [BarColumn(bar_width=12), MofNCompleteColumn(), TextColumn("{task.fields[text]}")]
            columns.append(TextColumn("{task.fields[left]}"))
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("training", total=total, completed=step, text="", left="")
            self._bar.start()

    def start_clock(self) -> None:
        """Training begins: the time left is estimated from here."""
        self.started = time.monotonic()

    def say(self, text: str) -> None:
        """Print lines that stay."""
        if not text:
            return
        if self._bar:
            self._bar.console.print(text, highlight=False, markup=False)
        elif self.main:
            print(text, flush=True)

    def track(self, items: Iterable[_Item], text: str, total: int) -> Iterator[_Item]:
        """Iterate with a bar of its own, or with a line at times where there is no terminal."""
        shown = time.monotonic()
        task = self._bar and self._bar.add_task(text, total=total, text=text, left="")
        try:
            for number, item in enumerate(items, 1):
                yield item
                if self._bar:
                    self._bar.update(task, completed=number)
                elif number < total and time.monotonic() - shown > LINE_SECONDS:
                    shown = time.monotonic()
                    self.say(f"{text}: {number} of {total} batches")
        finally:
            if self._bar:
                self._bar.remove_task(task)

    def update(self, step: int) -> None:
        """Move the bar: an update is done, on the host at least."""
        if self._bar:
            left = self._left(step)
            text = "" if left is None else f"{duration(left)} left"
            self._bar.update(self._task, completed=step, left=text)

    def _left(self, step: int) -> float | None:
        """Seconds to the end of the run, after two updates."""
        done = step - self.first
        return (time.monotonic() - self.started) / done * (self.total - step) if done >= 2 else None

    def add(self, **values) -> None:
        """Keep a line until the next flush, with what was compiled for it; values may be tensors on the device."""
        if self.main:
            self._pending.append(values | self._compile_stats.delta())

    def flush(self) -> None:
        """Fetch and write the pending lines, training lines with the interval's speed, and report what is new."""
        if not self._pending:
            return
        lines = [{key: plain_number(value) for key, value in line.items()} for line in self._pending]
        self._pending.clear()
        training = [line for line in lines if "loss" in line]
        if training and self.speed:
            figures = self.speed.measure()  # after the fetch, when the device has done the work
            for line in training:
                line |= figures
        with wrap_io_errors(self._path):
            self._file.writelines(json.dumps(line) + "\n" for line in lines)
            self._file.flush()
        for line in lines:
            for sink in self._sinks:
                sink({k: v for k, v in line.items() if k != "step" and v is not None}, line["step"])
            self._report(line)
        if training and self.speed:
            self._show(training[-1])

    def _report(self, line: dict) -> None:
        """Compilation and loss spikes."""
        if "compile_seconds" in line:
            hits, misses = line["compile_cache_hits"], line["compile_cache_misses"]
            text = f"compiled in {line['compile_seconds']:.1f} s"
            self.say(f"{text}, {hits} of {hits + misses} graphs from torch's cache")
        loss = line.get("loss")
        median = None if loss is None else self._spikes.update(loss)
        if median is not None:
            self.say(f"step {line['step']}: the loss jumped to {loss:.4f}, from about {median:.4f}")

    def _show(self, line: dict) -> None:
        step, left = line["step"], self._left(line["step"])
        speed, wait = f"{line['images_per_second']:.0f} images/s", f"{100 * line['data_wait']:.1f}%"
        loss = "not finite" if line["loss"] is None else f"{line['loss']:.4f}"
        text = f"loss {loss}  {speed}  data wait {wait}"
        if not self._announced and left:
            self._announced = True
            self.say(f"expected end: {clock(left)}, in {duration(left)}")
        if self._bar:
            self._bar.update(self._task, completed=step, text=text)
        elif step == self.total or time.monotonic() - self._shown > LINE_SECONDS:
            self._shown = time.monotonic()
            remaining = f"  {duration(left)} left" if left else ""
            self.say(f"step {step}/{self.total}  epoch {line['epoch']}  {text}{remaining}")

    def close(self) -> None:
        """Remove the bar, write what is pending and close the file."""
        if self._bar:
            self._bar.stop()
        if self.main:
            self.flush()
            with wrap_io_errors(self._path):
                os.fsync(self._file.fileno())
                self._file.close()


def _open_sink(sink: str, folder: Path, step: int) -> Callable[[dict, int], None]:
    kind, _, project = sink.partition(":")
    try:
        module = importlib.import_module("wandb" if kind == "wandb" else "torch.utils.tensorboard")
    except ImportError:
        raise UserError(f"log.to=[{sink}] needs a package: pip install {kind}") from None
    if kind == "wandb":
        # Resuming in the same folder continues the same run; two folders of one name are two runs.
        identity = f"{folder.name}-{zlib.crc32(str(folder.resolve()).encode()):08x}"
        run = module.init(project=project, name=folder.name, id=identity, dir=str(folder), resume="allow")
        return lambda values, step: run.log(values, step=step)
    writer = module.SummaryWriter(str(folder), purge_step=step + 1)

    def write(values: dict, step: int) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return write
