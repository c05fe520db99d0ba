"""What a run reports: metrics to their log, and progress to the terminal."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastalign.training.metrics import MetricLog, Speed, SpikeDetector


class Reporter:
    """A progress bar on a terminal, plain lines elsewhere; silent unless `main`. `total`, `step`: of the run."""

    def __init__(self, log: MetricLog, *, total: int, step: int, main: bool):
        self.log, self.main, self.total, self.first, self._bar = log, main, total, step, None
        self._spikes = SpikeDetector()
        self.start_clock()
        if main and sys.stderr.isatty():
            # Fits 80 columns: bar, steps, figures, time left.
            columns = [BarColumn(bar_width=12), MofNCompleteColumn(), TextColumn("{task.fields[text]}")]
            columns += [TimeRemainingColumn(compact=True), TextColumn("left")]
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("training", total=total, completed=step, text="")
            self._bar.start()

    def start_clock(self) -> None:
        """Training begins: the time left is estimated from here."""
        self.started = time.monotonic()

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if self._bar:
            self._bar.console.print(text, highlight=False)
        elif self.main:
            print(text, flush=True)

    def flush(self, speed: Speed | None = None) -> None:
        """Write the pending metrics; report compilation, loss spikes, and the newest training line."""
        lines = self.log.flush(speed)
        for line in lines:
            if "compile_seconds" in line:
                hits, misses = line["compile_cache_hits"], line["compile_cache_misses"]
                text = f"compiled in {line['compile_seconds']:.1f} s"
                self.say(f"{text}, {hits} of {hits + misses} graphs from torch's cache")
        training = [line for line in lines if "loss" in line]
        for line in training:
            median = None if line["loss"] is None else self._spikes.update(line["loss"])
            if median is not None:
                jump = f"the loss jumped to {line['loss']:.4f}, from about {median:.4f}"
                self.say(f"step {line['step']}: {jump}")
        if training and self.main:
            self._show(training[-1])

    def _show(self, line: dict) -> None:
        speed, wait = f"{line['images_per_second']:.0f} images/s", f"{100 * line['data_wait']:.1f}%"
        loss = "not finite" if line["loss"] is None else f"{line['loss']:.4f}"
        text = f"loss {loss}  {speed}  data wait {wait}"
        if self._bar:
            self._bar.update(self._task, completed=line["step"], text=text)
            return
        done = line["step"] - self.first
        left = (time.monotonic() - self.started) / max(done, 1) * (self.total - line["step"]) / 60
        at = f"step {line['step']}/{self.total}  epoch {line['epoch']}"
        print(f"{at}  {text}  {left:.1f} min left", flush=True)

    def close(self) -> None:
        """Remove the bar and close the log."""
        if self._bar:
            self._bar.stop()
        self.log.close()
