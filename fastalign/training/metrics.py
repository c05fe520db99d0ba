"""What is measured of a run: speed, compilation, loss spikes; and the files of metrics."""

import json
import math
import resource
import statistics
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import torch

from fastalign.method.flops import peak_flops
from fastalign.utils.errors import UserError
from fastalign.utils.files import write_atomically

# torch's names for capturing a graph with its forward code, and for backward code that is generated later
_COMPILE_TIMES = ("_compile.compile_inner", "backward._backward_impl")
_WINDOW, _MIN_LOSSES, _MIN_DEVIATIONS, _MIN_RATIO = 200, 50, 8.0, 1.2
_MAD_TO_STD = 1.4826  # standard deviation of a normal distribution over its median absolute deviation


def compile_seconds() -> float:
    """Seconds that torch.compile has taken in this process."""
    times = dict(zip(*torch._dynamo.utils.compile_times(repr="csv", aggregate=True), strict=True))
    return sum(float(times.get(name, 0)) for name in _COMPILE_TIMES)


class CompileStats:
    """What torch.compile did since the last `delta`. torch imports torch._dynamo on first use."""

    def __init__(self):
        self._graphs, self._totals = 0, {}
        self.delta()

    def delta(self) -> dict[str, float]:
        """Seconds, and graphs found and not found in torch's cache; empty if nothing was compiled."""
        counters, before = torch._dynamo.utils.counters, self._totals
        graphs, cache = counters["stats"]["unique_graphs"], counters["inductor"]
        if before and graphs == self._graphs:
            return {}
        hits, misses = cache["fxgraph_cache_hit"], cache["fxgraph_cache_miss"]
        now = {
            "compile_seconds": compile_seconds(),
            "compile_cache_hits": hits,
            "compile_cache_misses": misses,
        }
        self._graphs, self._totals = graphs, now
        return {name: value - before.get(name, 0) for name, value in now.items()}


class SpikeDetector:
    """Finds losses above the median of the last 200 by 8 robust standard deviations and by a fifth."""

    def __init__(self):
        self._losses: deque[float] = deque(maxlen=_WINDOW)

    def update(self, loss: float) -> float | None:
        """The median of the earlier losses if this one is a spike, else None (always for the first 50)."""
        earlier = list(self._losses)
        self._losses.append(loss)
        if len(earlier) < _MIN_LOSSES:
            return None
        median = statistics.median(earlier)
        spread = _MAD_TO_STD * statistics.median(abs(value - median) for value in earlier)
        return median if loss > max(median + _MIN_DEVIATIONS * spread, _MIN_RATIO * median) else None


class Speed:
    """Images per second, share of time spent waiting for data, and model FLOPs utilisation, by interval.

    Compilation time is left out. On a GPU the wait is the host's, an upper bound of the device's. `images`: per
    update, over all `ranks`; `flops`: of one image, forward and backward.
    """

    def __init__(self, *, images: int, ranks: int, flops: float, device: torch.device):
        self.images, self.device = images, device
        peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self.utilisation = flops / (peak * ranks) if peak else None
        self.start()

    def start(self) -> None:
        """Begin an interval."""
        self._since, self._steps, self._waited = time.perf_counter() - compile_seconds(), 0, 0.0

    def tick(self, waited: float) -> None:
        """Count an update, which waited so many seconds for data."""
        self._steps += 1
        self._waited += waited

    def measure(self) -> dict[str, float]:
        """The interval's figures; a new interval begins."""
        seconds = time.perf_counter() - compile_seconds() - self._since
        rate = self._steps * self.images / seconds
        figures = {"images_per_second": rate, "data_wait": self._waited / seconds}
        figures["memory"] = peak_memory(self.device)
        if self.utilisation:
            figures["mfu"] = rate * self.utilisation
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
    """Keep the lines of a file up to a step, without that step's validation and probe unless `evaluated`."""
    kept = []
    for line in path.read_text().splitlines():
        try:
            found = json.loads(line)
            if found["step"] < step or (found["step"] == step and (evaluated or "loss" in found)):
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue  # a line that an interruption cut short
    write_atomically(path, lambda file: file.write("".join(kept).encode()))


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics file, without a last line that an interruption cut short."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; name the folder of a run that has started")
    lines, found = path.read_bytes().splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
            if type(found[-1]["step"]) is not int:
                raise TypeError
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                message = f"{path}, line {number} is not a JSON object with a step; remove that line"
                raise UserError(message) from None
            del found[number - 1 :]
    return found


def series(lines: list[dict], key: str) -> tuple[list[int], list[float]]:
    """Ascending steps and values of a key, over the lines that have a number there; a later line of a step wins."""
    kept = {line["step"]: line[key] for line in lines if type(line.get(key)) in (int, float)}
    return sorted(kept), [kept[step] for step in sorted(kept)]


def mean_and_spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and sample standard deviation (n - 1; None for one value or if any is not finite)."""
    if not all(map(math.isfinite, values)):
        return {"mean": sum(values) / len(values), "std": None}
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else None}
