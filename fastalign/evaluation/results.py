"""Files and tables of results."""

import json
import math
from pathlib import Path

from rich import box
from rich.table import Table

from fastalign.evaluation.metrics import IMAGE_METRICS, PATCH_METRICS
from fastalign.training.metrics import mean_and_spread
from fastalign.utils.errors import UserError
from fastalign.utils.files import write_atomically

_GROUP = ("model", "labels", "head", "skip_blocks")
_PATCH_COLUMNS = {
    "macro_recall": "recall",
    "macro_precision": "precision",
    "macro_f1": "F1",
    "map": "mAP",
    "accuracy": "accuracy",
}
_IMAGE_COLUMNS = {"top-1": "{:.2%}", "top-5": "{:.2%}", "mean per class": "{:.2%}", "loss": "{:.4f}"}


def summarise(results: list[dict]) -> list[dict]:
    """Rows of probes, one for all seeds of a head: mean and deviation of each metric on the test split."""
    groups: dict[tuple, list[dict]] = {}
    for row in results:
        groups.setdefault(tuple(row[key] for key in _GROUP), []).append(row["test"])
    summary = []
    for key, tests in groups.items():
        names = [name for name in PATCH_METRICS if name in tests[0]]
        metrics = {name: mean_and_spread([test[name] for test in tests]) for name in names}
        summary.append({**dict(zip(_GROUP, key, strict=True)), "seeds": len(tests), "test": metrics})
    return summary


def patch_table(summary: list[dict], title: str) -> Table:
    """The summary of probes in percent, in 80 columns."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    shown = [key for key in ("model", "skip_blocks") if len({row[key] for row in summary}) > 1]
    for name in (*(key.removesuffix("_blocks") for key in shown), "probe"):
        table.add_column(name, overflow="fold")
    for name in _PATCH_COLUMNS.values():
        table.add_column(name, justify="right", no_wrap=True)
    for row in summary:
        figures = (percent(row["test"].get(name)).replace(" ± ", "±") for name in _PATCH_COLUMNS)
        table.add_row(*(str(row[key]) for key in shown), f"{row['labels']} {row['head']}", *figures)
    return table


def image_table(results: dict, name: str) -> Table:
    """The results of image classification with the model `name`, a row for each seed."""
    split = results["reported"]
    reads, head = results["backbone"]["reads"], results["settings"]["head"]
    table = Table(title=f"{name}: {split} split, {reads} -> {head}")
    for column in ("seed", *_IMAGE_COLUMNS, "epoch"):
        table.add_column(column, justify="right")
    rows = [(str(seed["seed"]), seed[split], str(seed["epoch"])) for seed in results["seeds"]]
    rows += [(name, results[name], "") for name in ("mean", "std")[: len(rows)]]
    for number, (name, figures, epoch) in enumerate(rows, 1):
        values = zip(_IMAGE_COLUMNS.values(), (figures[key] for key in IMAGE_METRICS), strict=True)
        cells = ("-" if value is None else form.format(value) for form, value in values)
        table.add_row(name, *cells, epoch, end_section=number == len(results["seeds"]))
    return table


def percent(value: dict | None, sign: str = "-") -> str:
    """71.3 ± 0.4; of a difference, with `sign` "+", +1.2 ± 0.4."""
    if value is None or value["mean"] is None or math.isnan(value["mean"]):
        return "-"
    spread = "" if value["std"] is None else f" ± {100 * value['std']:.1f}"
    return f"{100 * value['mean']:{sign}.1f}{spread}"


def check_output(path: Path, facts: dict) -> None:
    """Refuses to overwrite results of other facts, such as `settings` and `data`; makes the file's folder."""
    if path.is_dir():
        raise UserError(f"--output {path}: it is a folder; name a file, such as {path / 'probe.json'}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        return
    try:
        before = json.loads(path.read_bytes())
        changed = difference({key: before.get(key) for key in facts}, facts)
    except (ValueError, AttributeError):
        changed = "it is not a file of results"
    if changed:
        raise UserError(
            f"--output: {path} has the results of another setting ({changed}); name another output, or remove it"
        )


def difference(before: dict, now: dict, path: str = "") -> str:
    """The first value in which two trees of plain values differ: section.key was 1, is 2."""
    for key in sorted((before.keys() | now.keys()) - {"path", "root"}):  # the data set may be elsewhere
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            if changed := difference(old, new, f"{path}{key}."):
                return changed
        elif old != new:
            return f"{path}{key} was {old}, is {new}"
    return ""


def write_results(path: Path, facts: dict) -> None:
    """Writes results as JSON; a number that is not finite becomes null."""
    finite = json.loads(json.dumps(facts), parse_constant=lambda number: None)
    text = json.dumps(finite, indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))
