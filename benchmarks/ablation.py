"""What each choice of the method does, in miniature: ``python -m benchmarks.ablation [--seeds 0 1 2]``.

Every variant differs from the demo's recipe in the keys of `VARIANTS`, trains half as long, and is probed as
`demo.evidence` probes, on the validation split, because the result decides defaults; the test split is not read. The
cost is by formula (`fastalign.method.flops`), operations per image of a training step. Writes
`benchmarks/results/ablation.json` and the table `ablation.md`; finished trials are reused from their folder.
"""

import sys
from pathlib import Path

import torch

from benchmarks import record
from demo.trials import CORES, Trial, run_trials, score
from fastalign.config import load_config
from fastalign.evaluation.results import percent
from fastalign.method.flops import flops_per_image
from fastalign.training.build import build_objective
from fastalign.training.command import run_command
from fastalign.training.metrics import mean_and_spread

RECIPE = "configs/demo.yaml"
LENGTH = ("optim.epochs=1",)
"""Keys of all variants: half the recipe's length, so that many fit into a day."""
BASE = "as the recipe"
VARIANTS: dict[str, dict[str, tuple[str, ...]]] = {
    "": {BASE: ()},
    "hidden patches": {"leave the sequence (mode drop)": ("masks.mode=drop",)},
    "visible patches": {
        "Bernoulli 0.25": ("masks.distribution=bernoulli", "masks.ratio=0.25"),
        "Bernoulli 0.5": ("masks.distribution=bernoulli", "masks.ratio=0.5"),
        "Bernoulli 0.75": ("masks.distribution=bernoulli", "masks.ratio=0.75"),
        "blockwise 0.4": ("masks.distribution=blockwise",),
    },
    "masks an image": {
        "without complement": ("masks.complement=false",),
        "without the full mask": ("masks.full=false",),
        "one mask": ("masks.complement=false", "masks.full=false"),
    },
    "target": {
        "last block": ("teacher.skip_blocks=0",),
        "two blocks skipped": ("teacher.skip_blocks=2",),
        "pooled output only": ("teacher.skip_blocks=0", "teacher.prefix_only=true"),
    },
    "loss": {
        "cosine": ("loss.name=cosine",),
        "L1": ("loss.name=l1",),
        "MSE of hidden patches": ("loss.name=masked_mse",),
        "MSE of visible patches": ("loss.name=unmasked_mse",),
    },
    "soft-cap": {"none": ("student.softcap=null",)},
    "decoder": {"1 block": ("decoder.layers=1",), "4 blocks": ("decoder.layers=4",)},
    "training": {"twice as long": ("optim.epochs=2",)},
}
"""Group -> variant -> changed keys."""

COLUMNS = {
    "linear": ("union", "linear", "map"),
    "MLP": ("union", "mlp", "map"),
    "transformer": ("union", "transformer", "map"),
    "image": ("global-union", "linear", "map"),
}
"""Column -> (labels, head, metric)."""


def row_of(
    group: str, name: str, overrides: tuple[str, ...], results: dict[int, list[dict]], recipe: str
) -> dict:
    """A variant's scores, from the rows of its `probe.json` by seed, and its cost."""
    row = {"group": group, "variant": name, "overrides": list(overrides), "seeds": sorted(results)}
    objective, _ = build_objective(load_config(recipe, list(overrides)))
    row["gflop_per_image"] = flops_per_image(objective) / 1e9
    for column, wanted in COLUMNS.items():
        values = [score(results[seed], "val", *wanted)["mean"] for seed in row["seeds"]]
        row[column] = {"values": values, **mean_and_spread(values)}
    return row


def gain(row: dict, base: dict, column: str) -> dict[str, float | None] | None:
    """Mean and spread of a variant's gain over the recipe, by seed; None without a common seed."""
    before = dict(zip(base["seeds"], base[column]["values"], strict=True))
    pairs = zip(row["seeds"], row[column]["values"], strict=True)
    differences = [value - before[seed] for seed, value in pairs if seed in before]
    return mean_and_spread(differences) if differences else None


def table(rows: list[dict]) -> str:
    """The rows as Markdown, percent: the recipe's scores, and each variant's gain."""
    base, cells = next((row for row in rows if row["variant"] == BASE), None), []
    for row in rows:
        if base in (None, row):
            scores = [percent(row[column]) for column in COLUMNS]
        else:
            scores = [percent(gain(row, base, column), sign="+") for column in COLUMNS]
        cost = f"{row['gflop_per_image']:.3f}"
        cells.append([row["group"], row["variant"], str(len(row["seeds"])), *scores, cost])
    head = "Percent, validation split. First the recipe's scores, then what each variant gains on them, seed by seed."
    header = f"| | variant | seeds | {' | '.join(COLUMNS)} | GFLOP an image |"
    return f"{head}\n\n{record.markdown(header, cells)}"


def main(arguments: list[str] | None = None) -> list[dict]:
    """Train, probe, print, write."""
    parser = record.parser("ablation", __doc__, "two steps of two variants")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--root", type=Path, default=Path("runs/ablation"), help="folder of the trials")
    parser.add_argument("--recipe", default=RECIPE)
    parser.add_argument("--workers", type=int, default=CORES, help="trials at once")
    options = parser.parse_args(arguments)
    common = {"recipe": options.recipe}
    if options.tiny:
        common |= {"images": 64, "epochs": 1, "heads": ("linear", "mlp", "transformer")}
    variants = [(group, name, keys) for group, members in VARIANTS.items() for name, keys in members.items()]
    if options.tiny:
        variants = [(group, name, (*overrides, "max_steps=2")) for group, name, overrides in variants[:2]]
    # Seed by seed, so that an interrupted measurement has all variants of the first seeds.
    order = [
        Trial(name, seed, overrides=(*LENGTH, *overrides), **common)
        for seed in options.seeds
        for _, name, overrides in variants
    ]
    finished: dict[str, dict[int, list[dict]]] = {}
    for trial, found in zip(order, run_trials(order, options.root, options.workers), strict=True):
        finished.setdefault(trial.name, {})[trial.seed] = found
    rows = [row_of(*variant, finished[variant[1]], options.recipe) for variant in variants]
    print(table(rows))
    if not options.tiny:
        facts = {"split": "val", "recipe": options.recipe, "common": list(LENGTH)}
        record.write("ablation", rows, facts | {"gpu": torch.cuda.is_available()})
        record.replace(record.RESULTS / "ablation.md", table(rows))
    return rows


if __name__ == "__main__":
    sys.exit(run_command(main))
