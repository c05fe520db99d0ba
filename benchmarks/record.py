"""Where and with what a figure was taken, and how it is written down."""

import json
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import timm
import torch

RESULTS = Path(__file__).parent / "results"


def environment() -> dict:
    """Machine, versions, commit and command of this measurement."""
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True, check=False)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M"),
        "gpu": gpu,
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "timm": timm.__version__,
        "commit": commit.stdout.strip() or None,
        "command": "python -m " + " ".join([_module(), *sys.argv[1:]]),
        **(_gpu_state() if gpu else {}),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpu_state() -> dict:
    """Driver, clocks in MHz and power limit in watts, of the first GPU, as its own tool says them."""
    keys = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")
    query = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(keys)}", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {"driver": None}
    found = dict(zip(keys, text.strip().split(", "), strict=False))
    return {"driver": found.pop("driver_version", None), "gpu_state": found}


def write(name: str, rows: list[dict], extra: dict | None = None) -> Path:
    """Write `benchmarks/results/NAME.json`: the environment, one record a row, and what else there is to say."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        json.dumps({"environment": environment(), **(extra or {}), "rows": rows}, indent=1) + "\n"
    )
    return path


def _module() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else sys.argv[0]
