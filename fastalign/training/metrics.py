"""Metrics: a line of JSON a step, TensorBoard and Weights & Biases where asked for, and progress on the terminal.

Values stay on the device until they are flushed, so that the host never waits for a step.
"""

import json
import math
import os
import resource
import statistics
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from fastalign.method.flops import peak_flops
from fastalign.training.compilation import Compilation, compile_seconds
from fastalign.utils.errors import UserError
from fastalign.utils.files import wrap_io_errors, write_atomically


class MetricLog:
    """Writes the metrics of a run on the main rank; on the others it does nothing.

    Args:
        folder: the run folder; lines go to its `metrics.jsonl`.
        step: the step to continue from: lines of later steps, from before an interruption, are dropped.
        judged: that step was validated and probed; else its lines about that are dropped too.
        main: whether this rank writes.
        sinks: also log to "tensorboard" (events in `folder`) and "wandb:PROJECT".
    """

    def __init__(
        self,
        folder: Path,
        *,
        step: int = 0,
        judged: bool = True,
        main: bool = True,
        sinks: Sequence[str] = (),
    ):
        self._pending: list[dict] = []
        self._compilation = Compilation()
        self._file, self._sinks = None, []
        if not main:
            return
        self._path = path = folder / "metrics.jsonl"
        if path.exists():
            drop_later_lines(path, step, judged=judged)
        self._file = path.open("a")
        for sink in sinks:
            kind, _, project = sink.partition(":")
            self._sinks.append(_wandb(folder, project) if kind == "wandb" else _tensorboard(folder, step))

    def add(self, **values) -> None:
        """Keep a line until the next flush, with what was compiled for it; values may be tensors on the device."""
        if self._file:
            self._pending.append(values | self._compilation.news())

    def flush(self, speed: "Speed | None" = None) -> list[dict]:
        """Fetch what is pending from the device and write it, training lines with the interval's speed.

        Returns:
            The lines.
        """
        lines = [{key: _plain(value) for key, value in line.items()} for line in self._pending]
        self._pending.clear()
        common = speed.measure() if speed else {}  # after the fetch, so that the device has done the work
        for line in lines:
            if "loss" in line:
                line |= common
            with wrap_io_errors(self._path):
                self._file.write(json.dumps(line) + "\n")
            for sink in self._sinks:
                sink({k: v for k, v in line.items() if k != "step" and v is not None}, line["step"])
        if lines:
            with wrap_io_errors(self._path):
                self._file.flush()
        return lines

    def close(self) -> None:
        """Write what is pending."""
        if self._file:
            self.flush()
            with wrap_io_errors(self._path):
                os.fsync(self._file.fileno())
                self._file.close()


class Speed:
    """Images a second, the share of time spent waiting for data, and model FLOPs utilisation, by interval.

    On a GPU the wait is the host's, and an upper bound of the GPU's, which may still be at work on earlier steps.
    The time that compilation takes is left out.

    Args:
        images: an update, over all ranks.
        ranks: number of ranks.
        flops: of one image, forward and backward.
        device: this rank's; its peak is looked up by name.
    """

    def __init__(self, *, images: int, ranks: int, flops: float, device: torch.device):
        self.images, self.device = images, device
        peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self.utilisation = flops / (peak * ranks) if peak else None
        self.start()

    def start(self) -> None:
        """Begin an interval."""
        self._since, self._steps, self._waited = time.perf_counter() - compile_seconds(), 0, 0.0

    def tick(self, waited: float) -> None:
        """An update was made, `waited` seconds of which went into waiting for data."""
        self._steps += 1
        self._waited += waited

    def measure(self) -> dict[str, float]:
        """The interval's figures; a new one begins."""
        seconds = time.perf_counter() - compile_seconds() - self._since
        rate = self._steps * self.images / seconds
        figures = {
            "images_per_second": rate,
            "data_wait": self._waited / seconds,
            "memory": peak_memory(self.device),
        }
        if self.utilisation:
            figures["mfu"] = rate * self.utilisation
        self.start()
        return figures


class Terminal:
    """Progress on the terminal: a bar where there is one, plain lines where there is none."""

    def __init__(self, *, total: int, step: int, main: bool):
        self.main, self.total, self.first, self._bar = main, total, step, None
        self.begin()
        if main and sys.stderr.isatty():
            # Fits 80 columns: bar, steps, figures, time left.
            columns = [BarColumn(bar_width=12), MofNCompleteColumn(), TextColumn("{task.fields[text]}")]
            columns += [TimeRemainingColumn(compact=True), TextColumn("left")]
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("training", total=total, completed=step, text="")
            self._bar.start()

    def begin(self) -> None:
        """Training begins: the time left is reckoned from here."""
        self.started = time.monotonic()

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._bar:
            self._bar.console.print(text, highlight=False)
        elif self.main:
            print(text, flush=True)

    def say_compiled(self, lines: list[dict]) -> None:
        """What compilation cost, for lines that have it."""
        for line in lines:
            if "compile_seconds" in line:
                hits, misses = line["compile_cache_hits"], line["compile_cache_misses"]
                text = f"compiled in {line['compile_seconds']:.1f} s"
                self.say(f"{text}, {hits} of {hits + misses} graphs from torch's cache")

    def show(self, line: dict) -> None:
        """The newest training metrics."""
        if not self.main:
            return
        speed, wait = f"{line['images_per_second']:.0f} images/s", f"{100 * line['data_wait']:.1f}%"
        loss = "not finite" if line["loss"] is None else f"{line['loss']:.4f}"
        text = f"loss {loss}  {speed}  data wait {wait}"
        if self._bar:
            self._bar.update(self._task, completed=line["step"], text=text)
            return
        done = line["step"] - self.first
        left = (time.monotonic() - self.started) / max(done, 1) * (self.total - line["step"])
        print(
            f"step {line['step']}/{self.total}  epoch {line['epoch']}  {text}  {left / 60:.1f} min left",
            flush=True,
        )

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar:
            self._bar.stop()


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics file; a last line that was cut short by a killed run is left out.

    Raises:
        UserError: no such file, or a damaged line before the last one.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; name the folder of a run that has started")
    lines, found = path.read_bytes().splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            if type(entry["step"]) is not int:
                raise TypeError
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break
            raise UserError(
                f"{path}, line {number} is no JSON object with a step; remove that line"
            ) from None
        found.append(entry)
    return found


def series(lines: list[dict], key: str) -> tuple[list[int], list[float]]:
    """Steps, ascending, and values of a key, over the lines that have a number there.

    After a resume a step may occur twice; the later line counts.
    """
    kept = {line["step"]: line[key] for line in lines if type(line.get(key)) in (int, float)}
    return sorted(kept), [kept[step] for step in sorted(kept)]


def mean_and_spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean of one or more values, and their sample standard deviation (n - 1).

    One value has no spread, and neither have values of which one is not finite; their mean is not finite either.
    """
    if not all(map(math.isfinite, values)):
        return {"mean": sum(values) / len(values), "std": None}
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
    }


def peak_memory(device: torch.device) -> int:
    """Bytes: the GPU memory taken at most, or the resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _plain(value):
    """A number for JSON, which has none for infinity and NaN: null."""
    value = value.item() if isinstance(value, torch.Tensor) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def drop_later_lines(path: Path, step: int, *, judged: bool = True) -> None:
    """Keep the lines of a file up to a step, without that step's validation and probe where it is not `judged`."""
    kept = []
    for line in path.read_text().splitlines():
        try:
            found = json.loads(line)
            if found["step"] < step or (found["step"] == step and (judged or "loss" in found)):
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue  # the line that an interruption tore
    write_atomically(path, lambda file: file.write("".join(kept).encode()))


def _tensorboard(folder: Path, step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("log.to=[tensorboard] needs a package: pip install tensorboard") from None
    writer = SummaryWriter(str(folder), purge_step=step + 1)

    def write(values: dict, step: int) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return write


def _wandb(folder: Path, project: str):
    try:
        import wandb
    except ImportError:
        raise UserError("log.to=[wandb:...] needs a package: pip install wandb") from None
    # The same folder continues the same run; two folders of one name are two runs.
    identity = f"{folder.name}-{zlib.crc32(str(folder.resolve()).encode()):08x}"
    run = wandb.init(project=project, name=folder.name, id=identity, dir=str(folder), resume="allow")
    return lambda values, step: run.log(values, step=step)
