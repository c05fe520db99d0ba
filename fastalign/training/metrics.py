"""Speed and memory of a run, and its metrics files."""

import json
import math
import resource
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from fastalign.method.flops import peak_flops
from fastalign.utils.errors import UserError
from fastalign.utils.files import write_atomically


class Speed:
    """Images per second, share of time spent waiting for data, and model FLOPs utilization, by interval.

    On a GPU the wait is the host's, an upper bound of the device's. `images`: per update, over all `ranks`; `flops`:
    of one image, forward and backward.
    """

    def __init__(self, *, images: int, ranks: int, flops: float, device: torch.device):
        self.images, self.device = images, device
        peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self.utilization = flops / (peak * ranks) if peak else None
        self.start()

    def start(self) -> None:
        """Begin an interval."""
        self._since, self._steps, self._waited = time.perf_counter(), 0, 0.0

    def tick(self, waited: float) -> None:
        """Count an update that waited this many seconds for data."""
        self._steps += 1
        self._waited += waited

    def measure(self) -> dict[str, float]:
        """The metrics of the interval; then begin a new one."""
        seconds = time.perf_counter() - self._since
        rate = self._steps * self.images / seconds
        figures = {"images_per_second": rate, "data_wait": self._waited / seconds}
        figures["memory"] = peak_memory(self.device)
        if self.utilization:
            figures["mfu"] = rate * self.utilization
        self.start()
        return figures


def peak_memory(device: torch.device) -> int:
    """Bytes: the largest GPU memory allocated, or resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def plain_number(value):
    """A value for JSON, from a tensor or not; infinity and NaN become null."""
    value = value.item() if isinstance(value, torch.Tensor) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def drop_later_lines(path: Path, step: int, *, evaluated: bool = True) -> None:
    """Drop a file's lines after a step, and unless `evaluated` also that step's validation and probe."""
    kept = [
        line + b"\n"
        for line in path.read_bytes().splitlines()
        if (found := _parse(line))
        and (found["step"] < step or (found["step"] == step and (evaluated or "loss" in found)))
    ]
    write_atomically(path, lambda file: file.write(b"".join(kept)))


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics file, without a last line that an interruption cut short."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; name the folder of a run that has started")
    found = [_parse(line) for line in path.read_bytes().splitlines()]
    if found and found[-1] is None:
        found.pop()
    if None in found:
        line = found.index(None) + 1
        raise UserError(f"{path}, line {line} is not a JSON object with a step; remove that line")
    return found


def _parse(line: bytes) -> dict | None:
    """A line of a metrics file; None if it is not an object with a step."""
    try:
        found = json.loads(line)
        return found if type(found["step"]) is int else None
    except (ValueError, KeyError, TypeError):
        return None


def series(lines: list[dict], key: str) -> tuple[list[int], list[float]]:
    """Ascending steps and values of a key, where it is a number; the last of several lines for a step counts."""
    kept = {line["step"]: line[key] for line in lines if type(line.get(key)) in (int, float)}
    return sorted(kept), [kept[step] for step in sorted(kept)]


def mean_and_spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and sample standard deviation (n - 1; None for one value or if any is not finite)."""
    if not all(map(math.isfinite, values)):
        return {"mean": sum(values) / len(values), "std": None}
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else None}
