"""The command ``fastalign probe --backbone NAME_OR_RUN --data DATASET``."""

import shlex
import sys
from datetime import timedelta
from pathlib import Path

import torch
from rich.console import Console

from fastalign import __version__
from fastalign.backbones.precision import compute_dtype
from fastalign.evaluation.datasets import SPLITS, open_labelled
from fastalign.evaluation.options import (
    PatchReading,
    Plan,
    Recipe,
    evaluation_parser,
    from_flags,
    open_backbones,
)
from fastalign.evaluation.patches import probe
from fastalign.evaluation.results import check_output, patch_table, summarize, write_results
from fastalign.training import distributed
from fastalign.training.command import run_command
from fastalign.utils.errors import UserError
from fastalign.utils.files import path_argument


def run(arguments: list[str]) -> None:
    """Probe; rank 0 writes the results and prints the table."""
    parser = evaluation_parser(
        "probe",
        "Measure how well a small head predicts the classes in each patch from a frozen backbone's tokens.",
        Plan,
        Recipe,
        PatchReading,
        data="coco:ROOT, coco-things:ROOT, coco-panoptic:ROOT, ade20k:ROOT, or a folder",
        output="RUN/probe.json or runs/probe-NAME.json",
    )
    add = parser.add_argument
    add("--cache", type=path_argument, help="folder for temporary feature files; default that of the output")
    add("--skip-blocks", nargs="+", type=int, default=[0], metavar="X", help="last blocks to leave out")
    given = parser.parse_args(arguments)
    # Ranks without a head wait while others train.
    world = distributed.start(timeout=timedelta(days=30))
    plan = from_flags(Plan, given, recipe=from_flags(Recipe, given))
    reading = from_flags(PatchReading, given)
    splits = {name: open_labelled(given.data, name) for name in SPLITS}
    vits, folder = open_backbones(given)
    for vit in vits.values():
        vit.to(world.device).eval()
        if min(given.skip_blocks) < 0 or max(given.skip_blocks) > len(vit.blocks):
            skip = " ".join(map(str, given.skip_blocks))
            raise UserError(f"--skip-blocks {skip}: give numbers from 0 to {len(vit.blocks)}")
    default = folder / "probe.json" if folder else Path("runs") / f"probe-{given.backbone}.json"
    output = Path(given.output or default)
    data = {
        "path": given.data,
        "classes": list(splits["train"].classes),
        "images": {name: len(split) for name, split in splits.items()},
        "fingerprints": {name: f"{split.fingerprint():08x}" for name, split in splits.items()},
    }
    facts = {"data": data, "settings": plan.model_dump(mode="json")}
    check_output(output, facts)
    how = {"skip_blocks": given.skip_blocks, "folder": Path(given.cache or output.parent)}
    how |= {"batch_size": reading.forward_batch, "threads": reading.threads}
    how["dtype"] = compute_dtype(reading.precision, world.device)
    rows = probe(vits, splits, [plan], world, say=lambda text: print(text, flush=True), **how)
    if world.main:
        command, summary = shlex.join(["fastalign", "probe", *arguments]), summarize(rows)
        versions = {"fastalign": __version__, "torch": torch.__version__}
        facts = {"command": command, **facts, "versions": versions, "results": rows, "summary": summary}
        write_results(output, facts)
        title = f"{given.backbone}, test split of {given.data}, percent, seeds: {len(plan.seeds)}"
        Console().print(patch_table(summary, title))
        print(f"results: {output}")


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns the exit code: 0, or 2 for bad input."""
    return run_command(lambda: run(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
