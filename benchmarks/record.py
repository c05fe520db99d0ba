"""Where and with what a figure was taken, and how it is written down."""

import json
import platform
import subprocess
import sys
from datetime import datetime, timezone
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
        "timm": timm.__version__,
        "commit": commit.stdout.strip() or None,
        "command": "python -m " + " ".join([_module(), *sys.argv[1:]]),
    }


def write(name: str, rows: list[dict]) -> Path:
    """Write `benchmarks/results/NAME.json`: the environment and one record a row."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")
    return path


def _module() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else sys.argv[0]
