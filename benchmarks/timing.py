"""Timing: calls between device events or by the CPU's clock, in turns; and failures as one line."""

import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch

NO_MEMORY = "out of memory"


def attempt(function: Callable, *arguments) -> tuple[object, str | None]:
    """The result, or None and the reason in one line; no traceback keeps memory alive."""
    try:
        return function(*arguments), None
    except torch.OutOfMemoryError:
        return None, NO_MEMORY
    except Exception as error:  # a library may raise anything
        return None, f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]


def free(device: str) -> None:
    """Release unused memory."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def wait(device: str) -> None:
    """Until the device has nothing left to do."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(
    function: Callable[[], object], calls: int, device: str, clock: Callable[[], float] = time.process_time
) -> list[float]:
    """Seconds of each call: between events on a GPU, where calls are queued, by the clock on a CPU."""

    def mark():
        if device != "cuda":
            return clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    marks = [mark()]
    for _ in range(calls):
        function()
        marks.append(mark())
    if device != "cuda":
        return [after - before for before, after in pairwise(marks)]
    wait(device)
    return [before.elapsed_time(after) / 1e3 for before, after in pairwise(marks)]


def in_turns(names: list, rounds: int) -> list:
    """Each name once a round, every second round in reverse order."""
    return [name for index in range(rounds) for name in names[:: -1 if index % 2 else 1]]


def quantiles(times: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile in milliseconds."""
    tenths = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else times * 9
    return {"ms": statistics.median(times), "ms_p20": tenths[1], "ms_p80": tenths[7]}


def device_times(function: Callable[[], object]) -> list[float]:
    """Milliseconds on the GPU, between events, the L2 cache flushed before each call."""
    from triton.testing import do_bench

    return do_bench(function, warmup=10, rep=40, return_mode="all")


def host_ms(function: Callable[[], object], calls: int = 5) -> float:
    """CPU time of a call; if it exceeds the time on the GPU, the GPU is idle."""
    wait("cuda")
    before = time.perf_counter()
    for _ in range(calls):
        function()
    taken = time.perf_counter() - before
    wait("cuda")
    return 1e3 * taken / calls


def peak_mib(function: Callable[[], object]) -> float:
    """Peak memory of a call above what was allocated before."""
    function()
    wait("cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    wait("cuda")
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def machine() -> dict[str, float]:
    """The GPU's own copy bandwidth (bytes read and written) and bf16 matmul rate, random data."""
    source = torch.randn(2**29, device="cuda", dtype=torch.bfloat16)
    copy = statistics.median(device_times(partial(torch.empty_like(source).copy_, source)))
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    product = statistics.median(device_times(lambda: a @ b))
    return {"copy_gbps": 4 * 2**29 / copy / 1e6, "matmul_tflops": 2 * 8192**3 / product / 1e9}
