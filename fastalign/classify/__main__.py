"""The command: ``python -m fastalign.classify --backbone NAME_OR_RUN --data ROOT``, alone or under torchrun."""

import argparse
import shlex
import sys
from dataclasses import fields
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fastalign.classify.evaluate import REPORT, classify
from fastalign.classify.options import HEADS, Options
from fastalign.classify.scores import FIGURES
from fastalign.training import distributed
from fastalign.training.build import named_backbone
from fastalign.training.command import run_command
from fastalign.utils.errors import UserError
from fastalign.utils.paths import path_argument

_TITLES = {"top1": "top-1", "top5": "top-5", "mean_per_class": "mean per class", "loss": "loss"}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
        UserError: it cannot be understood.
    """
    parser = argparse.ArgumentParser(
        prog="python -m fastalign.classify",
        description="How well a backbone's features classify images: a head on it frozen, or fine-tuning.",
        epilog="Defaults that depend on head and mode are in docs/classify.md.",
    )
    parser.error = _refuse
    add = parser.add_argument
    for name, stands_for, text in (
        ("backbone", "NAME_OR_RUN", "the folder of a finished run, or a timm name"),
        ("data", "ROOT", "a folder with train/ and val/, and perhaps test/"),
        ("weights", "FILE", "of a timm name: pretrained (default), random, or a file"),
        ("output", "DIR", "default RUN, or runs/classify-NAME"),
    ):
        required = name in ("backbone", "data")
        add(f"--{name}", required=required, type=path_argument, metavar=stands_for, help=text)
    add("--kwargs", default="{}", metavar="YAML", help="timm's arguments, as in '{drop_path_rate: 0.1}'")
    add("--softcap", type=float, metavar="CAP", help="of a timm name's attention logits; default none")
    add("--head", default="linear", help=" | ".join(HEADS))
    add("--unfreeze", action="store_true", help="train the backbone too, on augmented images")
    add("--augment", action="store_true", help="frozen backbone, but new crops and flips each epoch")
    add("--seeds", nargs="+", type=int, default=list(Options.seeds), metavar="N", help="one training each")
    add("--precision", default="auto", help="auto (bf16 where the hardware has it) | bf16 | fp32")
    add("--grad-checkpointing", action="store_true", help="unfreeze: less memory, more time")
    for name, kind, text in (
        ("epochs", int, None),
        ("batch-size", int, "over all ranks"),
        ("accumulate", int, "parts that a rank's batch is computed in"),
        ("lr", float, "of the head, at its highest"),
        ("min-lr", float, "where the cosine ends; default lr / 10"),
        ("warmup-epochs", float, None),
        ("weight-decay", float, None),
        ("layer-decay", float, "unfreeze: factor of the learning rate from block to block"),
        ("clip", float, "largest gradient norm, 0 = any"),
        ("label-smoothing", float, None),
        ("mixup", float, "alpha, 0 = off"),
        ("cutmix", float, "alpha, 0 = off"),
        ("crop", str, "rrc | rkrc"),
        ("color-jitter", float, None),
        ("randaugment", str, "timm's spelling, as in rand-m9-mstd0.5-inc1"),
        ("threads", int, "reading threads a rank"),
        ("save-every", int, "updates between checkpoints, besides each epoch's end"),
        ("memory-share", float, "share of free memory that features may take; more lies in a file"),
    ):
        plain = getattr(Options, name.replace("-", "_"))
        default = "" if plain in (None, "") else f"default {plain}"
        add(f"--{name}", type=kind, default=plain, metavar="X", help="; ".join(filter(None, (text, default))))
    return parser.parse_args(arguments)


def _refuse(message: str) -> None:
    raise UserError(f"{message}; --help lists the options")


def table(report: dict) -> Table:
    """The result for the terminal."""
    shown = Table(
        title=f"{report['reported']} split, {report['backbone']['reads']} -> {report['settings']['head']}"
    )
    for title in ("seed", *_TITLES.values(), "epoch"):
        shown.add_column(title, justify="right")
    for result in report["seeds"]:
        figures = result[report["reported"]]
        shown.add_row(str(result["seed"]), *_cells(figures), str(result["epoch"]))
    shown.add_section()
    mean, std = _cells(report["mean"]), _cells(report["std"])
    shown.add_row("mean", *mean, "")
    if len(report["seeds"]) > 1:
        shown.add_row("std", *std, "")
    return shown


def _cells(figures: dict) -> list[str]:
    cells = []
    for name in FIGURES:
        value = figures[name]
        share = name != "loss"
        cells.append("-" if value is None else f"{100 * value:.2f}%" if share else f"{value:.4f}")
    return cells


def _run(given: argparse.Namespace, command: str) -> None:
    chosen = {field.name: getattr(given, field.name) for field in fields(Options)}
    chosen["seeds"] = tuple(given.seeds)
    Options(**chosen).resolved()  # before anything is loaded
    # A rank that has no seed left waits for those that train, hours perhaps.
    world = distributed.start(timeout=timedelta(days=30))
    vit, run = named_backbone(
        given.backbone, weights=given.weights, kwargs=given.kwargs, softcap=given.softcap
    )
    folder = Path(given.output) if given.output else run or Path("runs") / f"classify-{given.backbone}"
    say = (lambda text: print(text, flush=True)) if world.main else (lambda text: None)
    report = classify(vit, given.data, output=folder, world=world, say=say, command=command, **chosen)
    if world.main:
        console = Console()
        console.print(table(report))
        console.print(f"chosen: {report['selection']}", highlight=False)
        console.print(f"written: {folder / REPORT}", highlight=False, soft_wrap=True)


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns the exit code: 0, or 2 for bad input."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "fastalign.classify", *arguments])
    return run_command(lambda: _run(parse(arguments), command))


if __name__ == "__main__":
    sys.exit(main())
