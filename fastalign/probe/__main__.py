"""The command: ``python -m fastalign.probe --backbone NAME_OR_RUN --data DATASET``, alone or under torchrun."""

import argparse
import shlex
import sys
from dataclasses import asdict, fields
from datetime import timedelta
from pathlib import Path

import torch
from rich.console import Console

from fastalign import __version__
from fastalign.backbones.precision import compute_dtype
from fastalign.config import load_config
from fastalign.evaluation.datasets import open_labelled
from fastalign.probe.features import Probed, probed_backbone
from fastalign.probe.fit import METRICS, Recipe, check_options
from fastalign.probe.heads import HEADS, LABELS
from fastalign.probe.results import check_output, summarise, table_of, write_results
from fastalign.probe.run import Plan, probe
from fastalign.training import distributed
from fastalign.training.build import named_backbone, starting_backbone
from fastalign.training.command import run_command
from fastalign.utils.errors import UserError
from fastalign.utils.paths import path_argument


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
        UserError: it cannot be understood.
    """
    recipe, plan = Recipe(), Plan()
    parser = argparse.ArgumentParser(
        prog="python -m fastalign.probe",
        description="What a small head reads off a frozen backbone's tokens.",
    )
    parser.error = _refuse
    add = parser.add_argument
    add(
        "--backbone",
        required=True,
        type=path_argument,
        metavar="NAME_OR_RUN",
        help="timm's name, or a run's folder",
    )
    add(
        "--data",
        required=True,
        type=path_argument,
        help="coco:ROOT, coco-things:ROOT, coco-panoptic:ROOT, ade20k:ROOT, or a folder",
    )
    add("--before", action="store_true", help="also probe the backbone that the run started from")
    add("--weights", type=path_argument, help="of a timm name: pretrained (default), random, or a file")
    add("--kwargs", default="{}", help="timm's arguments, as YAML: {img_size: 336}")
    add("--softcap", type=float, help="of a timm name's attention logits; default none")
    add("--heads", nargs="+", choices=HEADS, default=list(plan.heads))
    add("--labels", nargs="+", choices=LABELS, default=list(plan.labels))
    add(
        "--skip-blocks",
        nargs="+",
        type=int,
        default=[0],
        help="last blocks left out; several are read at once",
    )
    add("--seeds", nargs="+", type=int, default=list(plan.seeds))
    add("--epochs", type=int, default=recipe.epochs)
    add("--batch-size", type=int, default=recipe.batch_size)
    add("--lr", type=float, default=recipe.lr)
    add("--min-lr", type=float, default=recipe.min_lr)
    add("--warmup-steps", type=int, default=recipe.warmup_steps, help="at most a tenth of all steps")
    add("--weight-decay", type=float, default=recipe.weight_decay)
    add("--select", choices=METRICS, default=recipe.select, help="what chooses the epoch, on the val split")
    add("--hidden", type=int, default=plan.hidden, help="width of the mlp head")
    add("--layers", type=int, default=plan.layers, help="blocks of the transformer heads")
    add("--forward-batch", type=int, default=64, help="images a forward pass of the backbone")
    add("--threads", type=int, default=4, help="reading and decoding threads a rank")
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 where it is fast")
    add("--cache", type=path_argument, help="folder for the features; default OUTPUT's folder/features")
    add("--keep-features", action="store_true", help="do not delete at the end what was read")
    add("--output", type=path_argument, help="default RUN/probe.json, or runs/probe-NAME.json")
    return parser.parse_args(arguments)


def _models(options: argparse.Namespace, device: torch.device) -> tuple[dict[str, Probed], Path | None]:
    """What is probed, by the name that results carry, and the run's folder where there is one."""
    vit, folder = named_backbone(
        options.backbone, weights=options.weights, kwargs=options.kwargs, softcap=options.softcap
    )
    models = {"aligned" if folder else options.backbone: vit}
    if options.before:
        recipe = (folder or Path(options.backbone)) / "config.yaml"
        if not recipe.is_file():
            raise UserError(f"--before: {recipe} is missing; it goes with the folder of a run")
        models = {"before": starting_backbone(load_config(recipe)), **models}
    probed = {name: probed_backbone(vit.to(device), options.skip_blocks) for name, vit in models.items()}
    return probed, folder


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns the exit code: 0, or 2 for bad input."""
    arguments = sys.argv[1:] if arguments is None else arguments

    def body() -> None:
        options = parse(arguments)
        # A rank that has no head left waits for those that train, hours perhaps.
        run(options, distributed.start(timeout=timedelta(days=30)), arguments)

    return run_command(body)


def _refuse(message: str) -> None:
    raise UserError(f"{message}; --help lists the options")


def run(options: argparse.Namespace, world: distributed.World, arguments: list[str]) -> None:
    """Probe as the options say; rank 0 writes the results and shows them.

    Raises:
        UserError: an option out of range, and what opening, reading and training refuse.
    """
    check_options(
        options, [(name, getattr(options, name) >= 1, "at least 1") for name in ("forward_batch", "threads")]
    )
    recipe = Recipe(**{field.name: getattr(options, field.name) for field in fields(Recipe)})
    plan = Plan(
        heads=tuple(dict.fromkeys(options.heads)),
        labels=tuple(dict.fromkeys(options.labels)),
        seeds=tuple(dict.fromkeys(options.seeds)),
        recipe=recipe,
        hidden=options.hidden,
        layers=options.layers,
    )
    splits = {name: open_labelled(options.data, name) for name in ("train", "val", "test")}
    models, folder = _models(options, world.device)
    default = folder / "probe.json" if folder else Path("runs") / f"probe-{options.backbone}.json"
    output = Path(options.output or default)
    about = {
        "data": {
            "path": options.data,
            "classes": list(splits["train"].classes),
            "images": {name: len(data.source) for name, data in splits.items()},
            "fingerprints": {name: f"{data.fingerprint():08x}" for name, data in splits.items()},
        },
        "settings": asdict(plan),
    }
    check_output(output, about)
    cache = Path(options.cache or output.parent / "features")
    rows = probe(
        models,
        splits,
        [plan],
        world,
        cache=cache,
        keep_features=options.keep_features,
        batch_size=options.forward_batch,
        threads=options.threads,
        dtype=compute_dtype(options.precision, world.device),
        say=lambda text: print(text, flush=True),
    )
    if not world.main:
        return
    facts = {
        "command": shlex.join(["python", "-m", "fastalign.probe", *arguments]),
        **about,
        "versions": {"fastalign": __version__, "torch": torch.__version__},
        "results": rows,
        "summary": summarise(rows),
    }
    write_results(output, facts)
    Console().print(table_of(facts["summary"], f"test split of {options.data}"))
    print(f"results: {output}")


if __name__ == "__main__":
    sys.exit(main())
