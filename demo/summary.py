"""Sums up a training run from its metrics.jsonl: a short table, and the curves as a picture beside it.

python -m demo.summary runs/demo
"""

import argparse
import sys
from pathlib import Path
from statistics import median

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table

from fastalign.training.metrics import read_metrics, series
from fastalign.utils.errors import UserError


def _median(lines: list[dict], key: str) -> float | None:
    """The middle value of a key over the lines that have it; None where none does."""
    values = series(lines, key)[1]
    return median(values) if values else None


def summarise(run: Path, lines: list[dict]) -> Table:
    """The summary of a run as a two-column table."""
    table = Table(title=str(run), show_header=False)
    steps, losses = series(lines, "val_loss")
    table.add_row("validation loss at the start", f"{losses[0]:.4f}  (step {steps[0]})")
    table.add_row("validation loss at the end", f"{losses[-1]:.4f}  (step {steps[-1]})")
    table.add_row("steps", str(max(line["step"] for line in lines)))
    speed, wait = _median(lines, "images_per_second"), _median(lines, "data_wait")
    table.add_row("images/s, median", "unknown" if speed is None else f"{speed:.0f}")
    table.add_row(
        "share of time spent waiting for data, median", "unknown" if wait is None else f"{wait:.1%}"
    )
    backbone = run / "backbone.safetensors"
    table.add_row("backbone", str(backbone) if backbone.is_file() else "not saved yet")
    return table


def plot(path: Path, lines: list[dict]) -> None:
    """Writes the curves of loss, learning rate and images per second over the steps as a PNG."""
    figure, (losses, rate, speed) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    losses.plot(*series(lines, "loss"), color="tab:blue", alpha=0.7, linewidth=1, label="training")
    losses.plot(*series(lines, "val_loss"), "o-", color="tab:red", markersize=4, label="validation")
    losses.set_ylabel("loss")
    losses.legend(frameon=False)
    rate.plot(*series(lines, "lr"), color="tab:green")
    rate.set_ylabel("learning rate")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    speed.plot(*series(lines, "images_per_second"), color="tab:purple", linewidth=1)
    speed.set_ylabel("images per second")
    for axes in (losses, rate, speed):
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m demo.summary", description="Sum up a training run.")
    parser.add_argument("run", type=Path, help="the run folder, e.g. runs/demo")
    run = parser.parse_args(argv).run
    try:
        lines = read_metrics(run / "metrics.jsonl")
        if not series(lines, "val_loss")[0]:
            raise UserError(f"{run} has no validation line yet; let the run reach its first validation")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    curves = run / "curves.png"
    plot(curves, lines)
    table = summarise(run, lines)
    table.add_row("curves", str(curves))
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
