"""Files and tables of results."""

import json
import math
from pathlib import Path
from typing import Any

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


def summarise(results: list[dict]) -> list[dict]:
    """Rows of probes, one for all seeds of a head: mean and deviation of each metric on the test split."""
    groups: dict[tuple, list[dict]] = {}
    for row in results:
        groups.setdefault(tuple(row[key] for key in _GROUP), []).append(row)
    summary = []
    for key, rows in groups.items():
        metrics = {
            name: mean_and_spread([row["test"][name] for row in rows])
            for name in PATCH_METRICS
            if all(name in row["test"] for row in rows)
        }
        summary.append({**dict(zip(_GROUP, key, strict=True)), "seeds": len(rows), "test": metrics})
    return summary


def patch_table(summary: list[dict], title: str) -> Table:
    """The summary of probes in percent, in 80 columns; what all rows share is in the title."""
    several = [key for key in ("model", "skip_blocks") if len({row[key] for row in summary}) > 1]
    parts = [title, "percent", f"seeds: {' or '.join(sorted({str(row['seeds']) for row in summary}))}"]
    if "model" not in several:
        parts.insert(0, summary[0]["model"])
    if "skip_blocks" not in several and summary[0]["skip_blocks"]:
        parts.insert(-2, f"skipped blocks: {summary[0]['skip_blocks']}")
    table = Table(title=", ".join(parts), box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for name in (*(key.removesuffix("_blocks") for key in several), "probe"):
        table.add_column(name, overflow="fold")
    for name in _PATCH_COLUMNS.values():
        table.add_column(name, justify="right", no_wrap=True)
    for row in summary:
        figures = (percent(row["test"].get(name)).replace(" ± ", "±") for name in _PATCH_COLUMNS)
        table.add_row(*(str(row[key]) for key in several), f"{row['labels']} {row['head']}", *figures)
    return table


def percent(value: dict | None, sign: str = "-") -> str:
    """71.3 ± 0.4; of a difference, with `sign` "+", +1.2 ± 0.4."""
    if value is None or value["mean"] is None or math.isnan(value["mean"]):
        return "-"
    spread = "" if value["std"] is None else f" ± {100 * value['std']:.1f}"
    return f"{100 * value['mean']:{sign}.1f}{spread}"


def image_table(results: dict, name: str = "") -> Table:
    """The results of image classification, a row for each seed; `name`: of the model, if it needs one."""
    reported = results["reported"]
    title = f"{reported} split, {results['backbone']['reads']} -> {results['settings']['head']}"
    table = Table(title=f"{name}: {title}" if name else title)
    for title in ("seed", "top-1", "top-5", "mean per class", "loss", "epoch"):
        table.add_column(title, justify="right")
    rows = [(str(seed["seed"]), seed[reported], str(seed["epoch"])) for seed in results["seeds"]]
    rows += [(name, results[name], "") for name in ("mean", "std")[: len(results["seeds"])]]
    for name, figures, epoch in rows:
        if name == "mean":
            table.add_section()
        shares = ("-" if figures[key] is None else f"{100 * figures[key]:.2f}%" for key in IMAGE_METRICS[:3])
        loss = "-" if figures["loss"] is None else f"{figures['loss']:.4f}"
        table.add_row(name, *shares, loss, epoch)
    return table


def check_output(path: Path, facts: dict) -> None:
    """Refuses to overwrite results of other `settings` or `data`; makes the file's folder."""
    if path.is_dir():
        raise UserError(f"--output {path}: it is a folder; name a file, such as {path / 'probe.json'}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        return
    try:
        before, now = json.loads(path.read_bytes()), json.loads(json.dumps(facts))
        changed = difference(
            *({key: each.get(key) for key in ("settings", "data")} for each in (before, now))
        )
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
    text = json.dumps(_plain(facts), indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
