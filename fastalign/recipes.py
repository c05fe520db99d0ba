"""The command ``fastalign recipes``: every published recipe with its backbone, resolution and cost."""

import argparse
import re
import sys

import timm

from fastalign.config import load_config, recipes
from fastalign.training.command import run_command


def print_recipes(*, ablations: bool) -> None:
    """Print a line per recipe; its resolution is its own, else that of timm's published weights."""
    line = "{:<27} {:>6} {:>6} {:>7}  {}".format  # 80 columns, except for a few long names at the end
    print(line("recipe", "pixels", "epochs", "GFLOP", "backbone"))
    for name, path in recipes().items():
        if path.parent.name == "ablations" and not ablations:
            continue
        config, cost = load_config(path), re.search(r"([\d.]+) GFLOP per image", path.read_text())
        student = config.student
        known = timm.get_pretrained_cfg(student.name) if timm.is_model(student.name) else None
        size = student.kwargs.get("img_size") or (known.input_size[-1] if known else "-")
        print(line(name, size, config.optim.epochs, cost[1] if cost else "-", student.name))


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns the exit code."""
    about = "List the recipes, with GFLOP per image. Train one with: fastalign train NAME data.train=PATH"
    parser = argparse.ArgumentParser(prog="fastalign recipes", description=about)
    parser.add_argument("--all", action="store_true", help="include the ablations")
    options = parser.parse_args(arguments)
    return run_command(lambda: print_recipes(ablations=options.all))


if __name__ == "__main__":
    sys.exit(main())
