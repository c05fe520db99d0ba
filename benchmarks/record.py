"""Where and with what a figure was taken, how it is written down, and when an earlier one still counts."""

import hashlib
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Hashable
from datetime import datetime, timezone
from pathlib import Path

import timm
import torch

from benchmarks.needs import installed

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
NO_ROOM = "does not fit into memory"
"""Why a row has no figure, if it is for want of memory."""
TABLE = "fastalign/attention/table.json"
SOURCES = ("fastalign/**/*.py", "kernels/*.py", "csrc/*", "benchmarks/*.py", TABLE)
"""The table too: it decides which attention runs."""
OURS = ("ours", "zero", "drop", "fp8")
"""Implementations that are measured; others are rivals."""
READERS = ("plots.py", "targets.py")
"""Of the benchmarks, those that only read results: they change no figure."""


def environment() -> dict:
    """Machine, versions, commit and command of this measurement."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M"),
        "gpu": gpu,
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "cuda": torch.version.cuda,
        "timm": timm.__version__,
        "commit": _said("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        "command": "python -m " + " ".join([_module(), *sys.argv[1:]]),
        **(_gpu_state() if gpu else {}),
    }


def _said(*command: str) -> str | None:
    """What a command prints; None where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def _gpu_state() -> dict:
    """Driver, clocks in MHz and power limit in watts, of the first GPU, as its own tool says them."""
    keys = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")
    query = f"--query-gpu={','.join(keys)}"
    text = _said("nvidia-smi", "--id=0", query, "--format=csv,noheader,nounits")
    found = dict(zip(keys, text.split(", "), strict=False)) if text else {}
    architecture = "sm_{}{}".format(*torch.cuda.get_device_capability())
    return {"architecture": architecture, "driver": found.pop("driver_version", None), "gpu_state": found}


def write(name: str, rows: list[dict], extra: dict | None = None) -> Path:
    """Write `benchmarks/results/NAME.json`: the environment, one record a row, and what else there is to say."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    text = json.dumps({"environment": environment(), **(extra or {}), "rows": rows}, indent=1)
    replace(path, text + "\n")
    return path


def replace(path: Path, text: str) -> None:
    """Write a file in one go: a run may be ended at any moment, and the next one goes on from what it finds."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def read(name: str) -> dict:
    """What `write` wrote; empty if it has not."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def identity(sources: tuple[str, ...] = SOURCES) -> dict:
    """What must be the same for two runs to belong to one result: the GPU, versions and sources.

    Not the commit: results that are written make the tree dirty, and the tree may have come without its history.
    """
    digest = hashlib.sha256()
    for path in sorted({path for pattern in sources for path in ROOT.glob(pattern)}):
        if path.is_file() and path.name not in READERS:
            digest.update(path.read_bytes())
    keys = ("gpu", "torch", "triton", "cuda", "driver")
    found = {key: value for key, value in environment().items() if key in keys}
    return found | {"sources": digest.hexdigest()[:16]}


def resume(name: str, identity: dict) -> dict:
    """What earlier parts of the same result wrote; empty if there are none, or anything differs."""
    earlier = read(name)
    differing = [key for key in identity if earlier.get("identity", {}).get(key) != identity[key]]
    if earlier and differing:
        print(f"starting anew: {name}.json has another {', '.join(differing)}")
        return {}
    return earlier


def left(wanted: list, rows: list[dict], of: Callable[[dict], Hashable]) -> list:
    """Of what is wanted, what has no row yet, and after that what is worth another try.

    That is what one of ours failed at, unless for want of memory. A rival's failure stands.

    Args:
        wanted: what is to be measured.
        rows: of earlier parts.
        of: which of the wanted a row belongs to.
    """
    had, failed = {of(row) for row in rows}, {of(row) for row in rows if _worth_another_try(row)}
    return [one for one in wanted if one not in had] + [one for one in wanted if one in failed]


def _worth_another_try(row: dict) -> bool:
    why = row.get("failed", NO_ROOM)
    return row.get("implementation", "ours") in OURS and why != NO_ROOM and "out of memory" not in why


def _module() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else sys.argv[0]
