"""Did alignment help? Probes of the demo's teacher, of students aligned with MaskEmbed, and of controls.

    python -m demo.evidence runs/demo                 (before and after, one seed: what `make demo` runs)
    python -m demo.evidence runs/demo --controls      (controls too, three seeds: `make evidence`)

A seed is that of training, masks and data order (of what is trained), and of the probes' heads.
"""

import argparse
import itertools
import sys
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from demo.trials import CORES, Trial, pictures, run_trials, score
from fastalign import __version__
from fastalign.config import load_config
from fastalign.evaluation.datasets import open_labelled
from fastalign.evaluation.results import percent, summarize, write_results
from fastalign.training.command import run_command
from fastalign.utils.errors import UserError

RECIPE = "configs/demo.yaml"
SEEDS, SPLIT = (0, 1, 2), "test"
TEACHER, ALIGNED = "teacher", "aligned (MaskEmbed)"
VISIBLE = ("masks.distribution=bernoulli", "masks.ratio=1.0", "masks.complement=false", "masks.full=false")
ROWS = {
    TEACHER: {"read": "teacher"},
    "teacher + untrained decoder": {"read": "decoder"},
    ALIGNED: {},
    "masked image modeling": {"overrides": ("objective=mim",)},
    "distilled, nothing hidden": {"overrides": VISIBLE},
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


def compare(
    run: Path, root: Path, seeds: list[int], workers: int, controls: bool = True
) -> dict[str, dict[str, dict]]:
    """Row -> column -> mean and spread over seeds; without `controls`, of teacher and aligned student alone.

    Runs the trials. Writes `evidence-test.json`, and the `probe.json` that a report shows. The demo's finished run is
    the aligned student of its own seed; `root` is the folder of the other trials.
    """
    if not (run / "backbone.json").is_file():
        raise UserError(f"evidence: {run} is not a finished run; train configs/demo.yaml first")
    demo_seed, names = load_config(RECIPE).seed, ROWS if controls else (TEACHER, ALIGNED)
    trials = []
    for name, seed in itertools.product(names, seeds):
        folder = str(run) if (name, seed) == (ALIGNED, demo_seed) else ""
        trials.append(Trial(name, seed, RECIPE, **ROWS[name], splits=(SPLIT,), folder=folder))
    results = run_trials(trials, root, workers)
    rows = [{**row, "model": trial.name} for trial, part in zip(trials, results, strict=True) for row in part]
    table = {}
    for name in names:
        own = [row for row in rows if row["model"] == name]
        table[name] = {column: score(own, SPLIT, *asked) for column, asked in COLUMNS.items()}
    facts = {"split": SPLIT, "seeds": seeds, "table": table, "versions": {"fastalign": __version__}}
    write_results(run / f"evidence-{SPLIT}.json", facts)
    shown = {TEACHER: "before", ALIGNED: "aligned"}
    rows = [{**row, "model": shown.get(row["model"], row["model"])} for row in rows]
    data = str(pictures(load_config(RECIPE)))
    splits = {name: open_labelled(data, name) for name in ("train", "val", SPLIT)}
    counts = {name: len(images) for name, images in splits.items()}
    about = {"path": data, "classes": list(splits[SPLIT].classes), "images": counts}
    facts = {"command": "python -m demo.evidence", "data": about, **facts}
    write_results(run / "probe.json", {**facts, "results": rows, "summary": summarize(rows)})
    return table


def show(table: dict[str, dict[str, dict]], seeds: int) -> None:
    """Print the table in 80 columns, and what the aligned student gains on the teacher."""
    spread = f", mean ± standard deviation of {seeds} seeds" * (seeds > 1)
    shown = Table(title=f"{SPLIT} split, percent{spread}", box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    shown.add_column("features of")
    for column in COLUMNS:
        header = column.replace(", ", ",\n").replace(" in ", " in\n")
        shown.add_column(header, justify="right", no_wrap=True)
    for name, row in table.items():
        figures = (percent(row[column]).replace(" ± ", "±") for column in COLUMNS)
        shown.add_row(name, *figures, end_section=name == list(table)[-1])
    gains = [table[ALIGNED][column]["mean"] - table[TEACHER][column]["mean"] for column in COLUMNS]
    shown.add_row("gain, in points", *(f"{100 * gain:+.1f}" for gain in gains))
    Console().print(shown)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m demo.evidence", description="Did alignment help?")
    parser.add_argument("run", type=Path, help="the demo's run folder, finished")
    parser.add_argument("--root", type=Path, default=Path("runs/evidence"), help="folder of the other trials")
    parser.add_argument("--controls", action="store_true", help="train and probe the controls too")
    parser.add_argument("--seeds", type=int, nargs="+", help="default 0, with --controls 0 1 2")
    parser.add_argument("--workers", type=int, default=CORES, help="trials at once")
    args = parser.parse_args(argv)
    args.seeds = args.seeds or list(SEEDS if args.controls else SEEDS[:1])
    return run_command(lambda: show(compare(**vars(args)), len(args.seeds)))


if __name__ == "__main__":
    sys.exit(main())
