"""The command ``fastalign classify --backbone NAME_OR_RUN --data ROOT``, and `classify` for Python."""

import argparse
import shlex
import sys
from datetime import timedelta
from pathlib import Path

from rich.console import Console

from fastalign.evaluation.images import RESULTS, classify
from fastalign.evaluation.options import ImageOptions, add_flags, evaluation_parser, from_flags
from fastalign.evaluation.results import image_table
from fastalign.training import distributed
from fastalign.training.build import backbone_before, named_backbone
from fastalign.training.command import run_command

__all__ = ["classify", "main"]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; UserError where it cannot be understood."""
    parser = evaluation_parser(
        "classify",
        "Image classification with a backbone: a head on its frozen features, or fine-tuning.",
        data="folder with train/ and val/, and perhaps test/",
        output="RUN or runs/classify-NAME, a folder",
    )
    parser.add_argument(
        "--before", action="store_true", help="also, and first, the backbone that the run started from"
    )
    parser.epilog = "Defaults that depend on head and mode are in docs/classify.md."
    add_flags(parser, ImageOptions)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns the exit code: 0, or 2 for bad input."""
    arguments = sys.argv[1:] if arguments is None else arguments

    def run() -> None:
        given = parse(arguments)
        options = from_flags(ImageOptions, given)
        options.resolved()  # refused before anything is loaded
        # Ranks without a seed of their own wait while others train.
        world = distributed.start(timeout=timedelta(days=30))
        vit, run_folder = named_backbone(
            given.backbone, weights=given.weights, kwargs=given.kwargs, softcap=given.softcap
        )
        models = {".": vit}
        if given.before:
            models = {"before": backbone_before(given.backbone, run_folder), **models}
        folder = Path(given.output or run_folder or Path("runs") / f"classify-{given.backbone}")
        say = (lambda text: print(text, flush=True)) if world.main else (lambda text: None)
        command = shlex.join(["fastalign", "classify", *arguments])
        for name, model in models.items():
            results = classify(
                model,
                given.data,
                output=folder / name,
                world=world,
                say=say,
                command=command,
                **dict(options),
            )
            if world.main:
                console = Console()
                console.print(image_table(results, name))
                console.print(f"chosen: {results['selection']}", highlight=False)
                console.print(f"written: {folder / name / RESULTS}", highlight=False, soft_wrap=True)

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
