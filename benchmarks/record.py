"""Where and with what a figure was taken, and how it is written down."""

import json
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"


def environment() -> dict:
    """Machine, versions, commit and command of this measurement."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M"),
        "gpu": gpu,
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _installed("triton"),
        "timm": _installed("timm"),
        "cuda": torch.version.cuda,
        "commit": _output("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        "command": "python -m " + " ".join([_module(), *sys.argv[1:]]),
        **(_gpu_state() if gpu else {}),
    }


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    named = path.exists() and re.search(r"^model name\s*: (.+)$", path.read_text(), re.M)
    return named[1].strip() if named else platform.machine()


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """What a command prints; None where it is missing or fails."""
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


def _module() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else sys.argv[0]


def write(name: str, rows: list[dict], extra: dict | None = None, key: tuple[str, ...] = ()) -> Path:
    """Write `benchmarks/results/NAME.json`: the environment, one record a row, and what else there is to say.

    Args:
        name: of the result.
        rows: what was measured.
        extra: more entries beside the environment.
        key: columns that identify a row. Rows that an earlier command measured on the same GPU or CPU stay, unless
            one of the new rows has the same key. Without a key the new rows replace all.
    """
    here, earlier = environment(), read(name)
    if key:
        rows = [row | {"commit": here["commit"], "date": here["date"]} for row in rows]
        new = {tuple(row.get(column) for column in key) for row in rows}
        if all(earlier.get("environment", {}).get(part) == here.get(part) for part in ("gpu", "cpu")):
            old = [row for row in earlier["rows"] if tuple(row.get(column) for column in key) not in new]
            rows = old + rows
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    replace(path, json.dumps({"environment": here, **(extra or {}), "rows": rows}, indent=1) + "\n")
    return path


def replace(path: Path, text: str) -> None:
    """Write a file by rename: a command may be stopped at any moment."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def read(name: str) -> dict:
    """What `write` wrote; empty if it has not."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}
