"""The results of probes: a row a head, gathered, summed up over seeds, written and shown."""

import json
import math
from pathlib import Path

from rich import box
from rich.table import Table

from fastalign.evaluation.fit import METRICS
from fastalign.training.metrics import mean_and_spread
from fastalign.utils.errors import UserError
from fastalign.utils.files import write_atomically

GROUP = ("model", "labels", "head", "skip_blocks")


def summarise(results: list[dict]) -> list[dict]:
    """One row for all seeds of a head: mean and spread of each metric on the test split."""
    groups: dict[tuple, list[dict]] = {}
    for row in results:
        groups.setdefault(tuple(row[key] for key in GROUP), []).append(row)
    summary = []
    for key, rows in groups.items():
        metrics = {
            name: mean_and_spread([row["test"][name] for row in rows])
            for name in METRICS
            if all(name in row["test"] for row in rows)
        }
        summary.append({**dict(zip(GROUP, key, strict=True)), "seeds": len(rows), "test": metrics})
    return summary


def table_of(summary: list[dict], title: str) -> Table:
    """The summary for a terminal of 80 columns, in percent: mean ± standard deviation over seeds.

    What is the same in all rows (one model, one layer) stands in the title.
    """
    columns = {
        "macro_recall": "recall",
        "macro_precision": "precision",
        "macro_f1": "F1",
        "map": "mAP",
        "accuracy": "accuracy",
    }
    several = {key: len({row[key] for row in summary}) > 1 for key in ("model", "skip_blocks")}
    parts = [title, "percent", f"seeds: {' or '.join(sorted({str(row['seeds']) for row in summary}))}"]
    if not several["model"]:
        parts.insert(0, summary[0]["model"])
    if not several["skip_blocks"] and summary[0]["skip_blocks"]:
        parts.insert(-2, f"skipped blocks: {summary[0]['skip_blocks']}")
    table = Table(title=", ".join(parts), box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    names = [name for name, key in (("model", "model"), ("skip", "skip_blocks")) if several[key]]
    for name in (*names, "probe"):
        table.add_column(name, overflow="fold")
    for name in columns.values():
        table.add_column(name, justify="right", no_wrap=True)
    for row in summary:
        cells = [str(row[key]) for key in ("model", "skip_blocks") if several[key]]
        cells.append(f"{row['labels']} {row['head']}")
        figures = (percent(row["test"].get(name)).replace(" ± ", "±") for name in columns)
        table.add_row(*cells, *figures)
    return table


def percent(value: dict | None, sign: str = "-") -> str:
    """71.3 ± 0.4; of a difference, with `sign` "+", +1.2 ± 0.4."""
    if value is None or math.isnan(value["mean"]):
        return "-"
    spread = "" if value["std"] is None else f" ± {100 * value['std']:.1f}"
    return f"{100 * value['mean']:{sign}.1f}{spread}"


def check_output(path: Path, about: dict) -> None:
    """Makes room for `probe.json`, before hours of work.

    Args:
        path: of the file.
        about: `data` and `settings` of the probe to come; results of others are not overwritten.

    Raises:
        UserError: a folder, or results of another probe.
    """
    if path.is_dir():
        raise UserError(f"--output {path}: it is a folder; name a file, such as {path / 'probe.json'}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        return
    try:
        earlier = json.loads(path.read_bytes())
        wanted = json.loads(json.dumps(_plain(about)))
        for facts in (earlier, wanted):
            del facts["data"]["path"]  # the fingerprints tell data sets apart, wherever they lie
        same = all(earlier.get(key) == value for key, value in wanted.items())
    except (ValueError, AttributeError, TypeError, KeyError):
        same = False
    if not same:
        raise UserError(
            f"--output {path}: it holds results of another probe; name another file, or remove it"
        )


def write_results(path: Path, facts: dict) -> None:
    """Writes `probe.json`, whole or not at all; a number that is not one becomes null."""
    text = json.dumps(_plain(facts), indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
