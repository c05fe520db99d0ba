"""The command ``fastalign recipes``: every published recipe with its backbone, resolution and cost."""

import argparse
import re
import sys
from pathlib import Path

import timm
from rich import box
from rich.console import Console
from rich.table import Table

from fastalign.config import Config, load_config, recipes

_COST = re.compile(r"([\d.]+) GFLOP per image")


def image_size(config: Config) -> int | None:
    """Pixels of a side: the recipe's, else that of timm's published weights; None if timm does not know the name."""
    name, kwargs = config.student.name, config.student.kwargs
    known = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    return kwargs.get("img_size") or (known and known.input_size[-1])


def table(published: dict[str, Path]) -> Table:
    """A row for each recipe of some names and files."""
    found = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for title in ("recipe", "backbone"):
        found.add_column(title, overflow="fold")
    for title in ("pixels", "epochs", "GFLOP per image"):
        found.add_column(title, justify="right")
    for name, path in published.items():
        config, cost = load_config(path), _COST.search(path.read_text())
        size, gigaflop = image_size(config) or "-", cost[1] if cost else "-"
        found.add_row(name, config.student.name, str(size), str(config.optim.epochs), gigaflop)
    return found


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="fastalign recipes",
        description="List the published recipes. Train one with: fastalign train NAME data.train=PATH",
    )
    parser.add_argument("--all", action="store_true", help="the ablations of the paper too")
    published, everything = recipes(), parser.parse_args(arguments).all
    Console().print(table({k: v for k, v in published.items() if everything or v.parent.name != "ablations"}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
