"""Sums up a training run: a short table, and its curves in RUN/curves.png.

python -m demo.summary runs/demo
"""

import argparse
import sys
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from fastalign.report import charts
from fastalign.training.command import run_command
from fastalign.training.metrics import read_metrics, series
from fastalign.utils.errors import UserError


def summarise(run: Path) -> Table:
    """The summary of a run as a two-column table; draws the curves. UserError if there was no validation yet."""
    lines, curves = read_metrics(run / "metrics.jsonl"), run / "curves.png"
    backbone = run / "backbone.safetensors"
    steps, losses = series(lines, "val_loss")
    if not steps:
        raise UserError(f"{run} has no validation loss yet; let the run reach its first validation")
    shown = charts.curves(lines, (charts.LOSS, "Learning rate", charts.THROUGHPUT))
    charts.curves_figure(shown).savefig(curves, **charts.PNG)
    speed, wait = series(lines, "images_per_second")[1], series(lines, "data_wait")[1]
    rows = {
        "validation loss at the start": f"{losses[0]:.4f}  (step {steps[0]})",
        "validation loss at the end": f"{losses[-1]:.4f}  (step {steps[-1]})",
        "steps": max(line["step"] for line in lines),
        "images/s, median": f"{median(speed):.0f}" if speed else "unknown",
        "share of time spent waiting for data, median": f"{median(wait):.1%}" if wait else "unknown",
        "backbone": backbone if backbone.is_file() else "not saved yet",
        "curves": curves,
    }
    table = Table(title=str(run), show_header=False)
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m demo.summary", description="Sum up a training run.")
    parser.add_argument("run", type=Path, help="the run folder, e.g. runs/demo")
    run = parser.parse_args(argv).run
    return run_command(lambda: Console().print(summarise(run)))


if __name__ == "__main__":
    sys.exit(main())
