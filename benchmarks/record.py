"""Result files: the environment of a measurement, rows in JSON, tables in Markdown; and the common options."""

import argparse
import json
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

from fastalign.utils.files import write_atomically

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"


def parser(name: str, description: str, tiny: str) -> argparse.ArgumentParser:
    """The options of ``python -m benchmarks.NAME``, with --tiny and its help."""
    result = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=description.splitlines()[0]
    )
    result.add_argument("--tiny", action="store_true", help=f"{tiny}: checks that it runs, writes nothing")
    return result


def markdown(header: str, rows: list[list[str]]) -> str:
    """A table in Markdown, from its header line and its cells."""
    separator = "|" + "---|" * (header.count("|") - 1)
    return "\n".join([header, separator, *(f"| {' | '.join(cells)} |" for cells in rows)]) + "\n"


def replace_table(page: Path, table: str) -> None:
    """Replace the table at the end of a page, found by its first two columns."""
    start = " |".join(table.split(" |")[:2])
    page.write_text(page.read_text().partition(start)[0] + table)


def environment() -> dict:
    """Machine, versions, commit and command of this measurement."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    spec = sys.modules["__main__"].__spec__
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M"),
        "gpu": gpu,
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton") if find_spec("triton") else None,
        "timm": version("timm"),
        "cuda": torch.version.cuda,
        "commit": _output("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        "command": "python -m " + " ".join([spec.name if spec else sys.argv[0], *sys.argv[1:]]),
        **(_gpu_state() if gpu else {}),
    }


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    named = path.exists() and re.search(r"^model name\s*: (.+)$", path.read_text(), re.M)
    return named[1].strip() if named else platform.machine()


def _output(*command: str) -> str | None:
    """The output of a command; None if it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def _gpu_state() -> dict:
    """Driver, clocks in MHz and power limit in watts of the first GPU, from nvidia-smi."""
    keys = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")
    query = f"--query-gpu={','.join(keys)}"
    text = _output("nvidia-smi", "--id=0", query, "--format=csv,noheader,nounits")
    found = dict(zip(keys, text.split(", "), strict=False)) if text else {}
    architecture = "sm_{}{}".format(*torch.cuda.get_device_capability())
    return {"architecture": architecture, "driver": found.pop("driver_version", None), "gpu_state": found}


def write(name: str, rows: list[dict], extra: dict | None = None, key: tuple[str, ...] = ()) -> Path:
    """Write `benchmarks/results/NAME.json`: the environment, `extra` entries, and the rows.

    With a key, the columns that identify a row, earlier rows of the same GPU or CPU stay unless a new row has the
    same key. Without a key the new rows replace all.
    """
    here, earlier = environment(), read(name)
    if key:
        rows = [row | {"commit": here["commit"], "date": here["date"]} for row in rows]
        new = {tuple(row.get(column) for column in key) for row in rows}
        if all(earlier.get("environment", {}).get(part) == here.get(part) for part in ("gpu", "cpu")):
            old = [row for row in earlier["rows"] if tuple(row.get(column) for column in key) not in new]
            rows = old + rows
    path = RESULTS / f"{name}.json"
    replace(path, json.dumps({"environment": here, **(extra or {}), "rows": rows}, indent=1) + "\n")
    return path


def replace(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda file: file.write(text.encode()))


def read(name: str) -> dict:
    """The contents of a result file; empty if it does not exist."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}
