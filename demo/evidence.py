"""Did alignment help? Probes of the demo's teacher, of students aligned with MaskEmbed, and of controls.

    python -m demo.evidence runs/demo

Each row has three seeds: of training, masks and data order (where there is training), and of the probes' heads. The
setting was fixed on the validation split before any figure of the test split was seen (demo/README.md).
"""

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from demo.trials import CORES, Trial, pictures, run_trials, score
from fastalign import __version__
from fastalign.config import load_config
from fastalign.evaluation.datasets import open_labelled
from fastalign.evaluation.results import percent, summarise, write_results
from fastalign.utils.errors import UserError
from fastalign.utils.files import write_atomically

RECIPE = "configs/demo.yaml"
SEEDS = (0, 1, 2)
NOTHING_HIDDEN = (
    "masks.distribution=bernoulli",
    "masks.ratio=1.0",
    "masks.complement=false",
    "masks.full=false",
)
ROWS = {
    "teacher": {"read": "teacher"},
    "teacher + untrained decoder": {"read": "decoder"},
    "aligned (MaskEmbed)": {},
    "masked image modeling": {"overrides": ("objective=mim",)},
    "distilled, nothing hidden": {"overrides": NOTHING_HIDDEN},
}
"""What is compared: how each trial differs from the demo's recipe."""

COLUMNS = {
    "patches, linear": ("union", "linear", "map"),
    "patches, MLP": ("union", "mlp", "map"),
    "patches, transformer": ("union", "transformer", "map"),
    "recall, transformer": ("union", "transformer", "macro_recall"),
    "image, linear": ("global-union", "linear", "map"),
    "image in a patch": ("global-in-patch", "linear", "map"),
}
"""Column -> (labels, head, metric)."""


def trials(run: Path, seeds: tuple[int, ...], split: str) -> list[Trial]:
    """Every row and seed; the demo's own run is the aligned student of its seed."""
    own = load_config(RECIPE).seed
    found = []
    for name, differs in ROWS.items():
        for seed in seeds:
            is_run = name.startswith("aligned") and seed == own
            found.append(
                Trial(name, seed, RECIPE, **differs, splits=(split,), folder=str(run) if is_run else "")
            )
    return found


def scores(results: list[list[dict]], asked: list[Trial], split: str) -> dict[str, dict[str, dict]]:
    """Row -> column -> mean and spread over the seeds."""
    table: dict[str, dict[str, dict]] = {}
    for name in dict.fromkeys(trial.name for trial in asked):
        rows = [row for trial, part in zip(asked, results, strict=True) if trial.name == name for row in part]
        table[name] = {column: score(rows, split, *asked_of) for column, asked_of in COLUMNS.items()}
    return table


def verdict(table: dict[str, dict[str, dict]]) -> list[str]:
    """What the table says of the aligned student against the teacher, in words."""
    before, after = table["teacher"], table["aligned (MaskEmbed)"]
    lines = []
    for column in COLUMNS:
        gain = 100 * (after[column]["mean"] - before[column]["mean"])
        spread = 100 * max(part[column]["std"] or 0.0 for part in (before, after))
        lines.append(f"{column}: {gain:+.1f} points, spread {spread:.1f}")
    return lines


def show(table: dict[str, dict[str, dict]], split: str, seeds: int) -> Table:
    """The table for the terminal."""
    shown = Table(title=f"{split} split, percent, mean ± standard deviation of {seeds} seeds")
    shown.add_column("features of")
    for column in COLUMNS:
        shown.add_column(column, justify="right")
    for name, row in table.items():
        shown.add_row(name, *(percent(row[column]) for column in COLUMNS))
    return shown


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m demo.evidence", description="Did alignment help?")
    parser.add_argument("run", type=Path, help="the demo's run folder, finished")
    parser.add_argument("--root", type=Path, default=Path("runs/evidence"), help="folder of the other trials")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--split", default="test", choices=("val", "test"))
    parser.add_argument("--workers", type=int, default=CORES, help="trials at once")
    args = parser.parse_args(argv)
    asked = trials(args.run, tuple(args.seeds), args.split)
    try:
        if not (args.run / "backbone.json").is_file():
            raise UserError(f"evidence: {args.run} is no finished run; train configs/demo.yaml first")
        results = run_trials(asked, args.root, lambda text: print(text, flush=True), args.workers)
        table = scores(results, asked, args.split)
        _write(args, asked, results, table)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    Console(width=max(Console().width, 120)).print(show(table, args.split, len(args.seeds)))
    print("aligned against teacher: " + "; ".join(verdict(table)))
    return 0


def _write(args: argparse.Namespace, asked: list[Trial], results: list[list[dict]], table: dict) -> None:
    """`evidence.json`, and the `probe.json` that a report draws, where the test split was read."""
    facts = {"split": args.split, "seeds": args.seeds, "table": table, "versions": {"fastalign": __version__}}
    text = json.dumps(facts, indent=1) + "\n"
    write_atomically(args.run / f"evidence-{args.split}.json", lambda file: file.write(text.encode()))
    if args.split != "test":
        return
    data = str(pictures(load_config(RECIPE)))
    names = {"teacher": "before", "aligned (MaskEmbed)": "aligned"}
    rows = [
        {**row, "model": names.get(trial.name, trial.name)}
        for trial, part in zip(asked, results, strict=True)
        for row in part
    ]
    splits = {name: open_labelled(data, name) for name in ("train", "val", "test")}
    counts = {name: len(split) for name, split in splits.items()}
    about = {"path": data, "classes": list(splits["test"].classes), "images": counts}
    command = "python -m demo.evidence"
    write_results(
        args.run / "probe.json",
        {"command": command, "data": about, **facts, "results": rows, "summary": summarise(rows)},
    )


if __name__ == "__main__":
    sys.exit(main())
