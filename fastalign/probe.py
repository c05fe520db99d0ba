"""The command ``fastalign probe --backbone NAME_OR_RUN --data DATASET``."""

import argparse
import shlex
import sys
from datetime import timedelta
from pathlib import Path
from typing import get_args

import torch
from rich.console import Console

from fastalign import __version__
from fastalign.backbones.precision import compute_dtype
from fastalign.evaluation.datasets import open_labelled
from fastalign.evaluation.features import Encoder, frozen_encoder
from fastalign.evaluation.options import Plan, Precision, Recipe, add_flags, evaluation_parser, from_flags
from fastalign.evaluation.patches import probe
from fastalign.evaluation.results import check_output, patch_table, summarise, write_results
from fastalign.training import distributed
from fastalign.training.build import backbone_before, named_backbone
from fastalign.training.command import run_command
from fastalign.utils.paths import path_argument


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; UserError where it cannot be understood."""
    parser = evaluation_parser(
        "probe",
        "What a small head predicts from a frozen backbone's tokens.",
        data="coco:ROOT, coco-things:ROOT, coco-panoptic:ROOT, ade20k:ROOT, or a folder",
        output="RUN/probe.json or runs/probe-NAME.json",
    )
    add = parser.add_argument
    add("--before", action="store_true", help="also probe the backbone that the run started from")
    add("--cache", type=path_argument, help="folder for features; default `features` next to the output")
    add("--keep-features", action="store_true", help="do not delete features at the end")
    add("--skip-blocks", nargs="+", type=int, default=[0], metavar="X", help="last blocks left out")
    add("--forward-batch", type=int, default=64, metavar="X", help="images per forward pass (default 64)")
    add("--threads", type=int, default=4, metavar="X", help="reading threads per rank (default 4)")
    add("--precision", choices=get_args(Precision), default="auto", help="auto: bf16 if supported")
    add_flags(parser, Plan, Recipe)
    return parser.parse_args(arguments)


def _encoders(given: argparse.Namespace, device: torch.device) -> tuple[dict[str, Encoder], Path | None]:
    """What is probed, by its name in the results, and the run folder if there is one."""
    vit, folder = named_backbone(
        given.backbone, weights=given.weights, kwargs=given.kwargs, softcap=given.softcap
    )
    models = {"aligned" if folder else given.backbone: vit}
    if given.before:
        models = {"before": backbone_before(given.backbone, folder), **models}
    return {name: frozen_encoder(vit.to(device), given.skip_blocks) for name, vit in models.items()}, folder


def run(given: argparse.Namespace, world: distributed.World, arguments: list[str]) -> None:
    """Probes; rank 0 writes the results and prints the table.

    Raises:
        UserError: an invalid option, data that cannot be read, a loss that is not finite.
    """
    plan = from_flags(Plan, given, recipe=from_flags(Recipe, given))
    splits = {name: open_labelled(given.data, name) for name in ("train", "val", "test")}
    encoders, folder = _encoders(given, world.device)
    default = folder / "probe.json" if folder else Path("runs") / f"probe-{given.backbone}.json"
    output = Path(given.output or default)
    data = {
        "path": given.data,
        "classes": list(splits["train"].classes),
        "images": {name: len(split) for name, split in splits.items()},
        "fingerprints": {name: f"{split.fingerprint():08x}" for name, split in splits.items()},
    }
    facts = {"data": data, "settings": plan.model_dump()}
    check_output(output, identity, identity(facts))
    rows = probe(
        encoders,
        splits,
        [plan],
        world,
        cache=Path(given.cache or output.parent / "features"),
        keep_features=given.keep_features,
        batch_size=given.forward_batch,
        threads=given.threads,
        dtype=compute_dtype(given.precision, world.device),
        say=lambda text: print(text, flush=True),
    )
    if not world.main:
        return
    summary = summarise(rows)
    write_results(
        output,
        {
            "command": shlex.join(["fastalign", "probe", *arguments]),
            **facts,
            "versions": {"fastalign": __version__, "torch": torch.__version__},
            "results": rows,
            "summary": summary,
        },
    )
    Console().print(patch_table(summary, f"test split of {given.data}"))
    print(f"results: {output}")


def identity(facts: dict) -> dict:
    """What decides the results; the data set may be elsewhere."""
    data = {key: value for key, value in facts["data"].items() if key != "path"}
    return {"data": data, "settings": facts["settings"]}


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns the exit code: 0, or 2 for bad input."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # Ranks without a head of their own wait while others train.
    return run_command(
        lambda: run(parse(arguments), distributed.start(timeout=timedelta(days=30)), arguments)
    )


if __name__ == "__main__":
    sys.exit(main())
