"""The command ``fastalign recipes``: every published recipe with its backbone, resolution and cost."""

import argparse
import re
import sys
from pathlib import Path

import timm
from rich import box
from rich.console import Console
from rich.table import Table

from fastalign.config import load_config, recipes

_COST = re.compile(r"([\d.]+) GFLOP per image")


def row(name: str, path: Path) -> tuple[str, ...]:
    """The cells of a recipe; its resolution is its own, else that of timm's published weights."""
    config, cost = load_config(path), _COST.search(path.read_text())
    student = config.student
    known = timm.get_pretrained_cfg(student.name) if timm.is_model(student.name) else None
    size = student.kwargs.get("img_size") or (known.input_size[-1] if known else "-")
    return name, student.name, str(size), str(config.optim.epochs), cost[1] if cost else "-"


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="fastalign recipes",
        description="List the published recipes. Train one with: fastalign train NAME data.train=PATH",
    )
    parser.add_argument("--all", action="store_true", help="the ablations of the paper too")
    everything = parser.parse_args(arguments).all
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for title in ("recipe", "backbone"):
        table.add_column(title, overflow="fold")
    for title in ("pixels", "epochs", "GFLOP per image"):
        table.add_column(title, justify="right")
    for name, path in recipes().items():
        if everything or path.parent.name != "ablations":
            table.add_row(*row(name, path))
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
