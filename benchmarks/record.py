"""Where and with what a figure was taken, how it is written down, and when an earlier one still counts."""

import hashlib
import json
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import timm
import torch

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
SOURCES = ("fastalign/**/*.py", "kernels/*.py", "csrc/*", "benchmarks/*.py")
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
        "triton": _version("triton"),
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


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpu_state() -> dict:
    """Driver, clocks in MHz and power limit in watts, of the first GPU, as its own tool says them."""
    keys = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")
    query = f"--query-gpu={','.join(keys)}"
    text = _said("nvidia-smi", "--id=0", query, "--format=csv,noheader,nounits")
    found = dict(zip(keys, text.split(", "), strict=False)) if text else {}
    return {"driver": found.pop("driver_version", None), "gpu_state": found}


def write(name: str, rows: list[dict], extra: dict | None = None) -> Path:
    """Write `benchmarks/results/NAME.json`: the environment, one record a row, and what else there is to say."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    text = json.dumps({"environment": environment(), **(extra or {}), "rows": rows}, indent=1)
    # In one go: a run may be ended at any moment, and the next one goes on from what it finds.
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text + "\n")
    temporary.replace(path)
    return path


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


def _module() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else sys.argv[0]
