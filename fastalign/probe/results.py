"""The results of probes: a row a head, gathered, summed up over seeds, written and shown."""

import json
import statistics
from pathlib import Path

from rich.table import Table

from fastalign.engine.checkpoint import write_atomically
from fastalign.probe.fit import METRICS

GROUP = ("model", "labels", "head", "skip_blocks")


def mean_and_spread(values: list[float]) -> dict[str, float | None]:
    """Mean and sample standard deviation, which one value has not got."""
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
    }


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
    """The summary for the terminal, in percent: mean ± standard deviation over seeds."""
    columns = ("macro_recall", "macro_precision", "macro_f1", "map", "accuracy")
    table = Table(title=title)
    for name in ("model", "labels", "head", "skipped blocks", "seeds"):
        table.add_column(name)
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right")
    for row in summary:
        cells = [row["model"], row["labels"], row["head"], str(row["skip_blocks"]), str(row["seeds"])]
        table.add_row(*cells, *(percent(row["test"].get(name)) for name in columns))
    return table


def percent(value: dict | None) -> str:
    """71.3 ± 0.4"""
    if value is None:
        return "-"
    spread = "" if value["std"] is None else f" ± {100 * value['std']:.1f}"
    return f"{100 * value['mean']:.1f}{spread}"


def write_results(path: Path, facts: dict) -> None:
    """Writes `probe.json`, whole or not at all; a number that is not one becomes null."""
    text = json.dumps(_plain(facts), indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and value != value else value
