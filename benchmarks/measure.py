"""How operations are measured: the check before any timing, clocks, memory, the machine's own limits."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases import Built
from benchmarks.tolerance import allowed, errors

NO_ROOM = "does not fit into memory"

MODES = ("forward", "backward", "full")
ROUNDS, WARM_UP_MS, REPEAT_MS = 3, 10, 40
LARGEST_ERROR = 0.05
"""An implementation further from the truth than this computes something else and is not compared."""


@dataclass
class Verdict:
    """What the check found."""

    errors: dict[str, float] = field(default_factory=dict)
    """Largest relative error of any output or gradient, by implementation."""
    refused: dict[str, str] = field(default_factory=dict)
    """Why an implementation is not timed."""


def free(device: str) -> None:
    """Give back what is no longer used."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def reason(error: Exception) -> str:
    """One line for a row that has no time."""
    if isinstance(error, torch.OutOfMemoryError):
        return NO_ROOM
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def attempt(function: Callable, *arguments) -> tuple[object, str | None]:
    """The result, or why there is none; no traceback stays behind that holds memory."""
    try:
        return function(*arguments), None
    except Exception as error:  # any library may fail in its own way; the row says how
        return None, reason(error)


def _tensors(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def cotangents(built: Built) -> list[Tensor]:
    """Random ones, for every output, in the layout that the kernel gives it."""
    with torch.no_grad():
        return [torch.randn_like(output) for output in _tensors(built.forward())]


def _evaluate(built: Built, function: Callable, given: list[Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients by name."""
    outputs = _tensors(built.forward(function))
    gradients = built.backward(outputs, [g.to(o.dtype) for g, o in zip(given, outputs, strict=True)])
    named = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    return named | {f"gradient of {n}": g for n, g in zip(built.case.leaves, gradients, strict=True)}


def _in_double(built: Built) -> Built:
    def double(value):
        return value.detach().double() if isinstance(value, Tensor) and value.is_floating_point() else value

    inputs = {name: double(value) for name, value in built.inputs.items()}
    for name in built.case.leaves:
        inputs[name].requires_grad_()
    return Built(built.case, inputs)


def _compare(results: dict[str, Tensor], truths: dict[str, Tensor]) -> dict[str, Tensor]:
    for name, truth in truths.items():
        if results[name].shape != truth.shape:
            raise ValueError(f"{name} is {list(results[name].shape)}, not {list(truth.shape)}")
    return {name: errors(results[name], truth) for name, truth in truths.items()}


def _complaint(ours: dict[str, Tensor], eager: dict[str, Tensor], dtypes: dict) -> str | None:
    """What is wrong by the rule of the tests."""
    for name, error in ours.items():
        bound = allowed(eager[name], dtypes[name])
        if not bool((error <= bound).all()):  # not a number is wrong as well
            return f"wrong: {name} has error {error.tolist()}, allowed {bound.tolist()}"
    return None


def check(built: Built, functions: dict[str, Callable], uncapped: set[str] = frozenset()) -> Verdict:
    """Compare every implementation, forward and backward, with the reference in float64.

    Args:
        built: a case with its inputs.
        functions: implementations by name; `ours` and `eager` are among them.
        uncapped: those that leave out the soft-cap on purpose: they only have to run.
    """
    verdict = Verdict()
    # Ours runs first, so that memory it forgets to write does not hold the right values by chance.
    given = cotangents(built)
    ours = _evaluate(built, functions["ours"], given)
    dtypes = {name: value.dtype for name, value in ours.items()}
    truths = _evaluate(_in_double(built), built.case.reference, given)
    eager = _compare(_evaluate(built, functions["eager"], given), truths)
    found = {"ours": _compare(ours, truths), "eager": eager}
    del ours
    complaint = _complaint(found["ours"], eager, dtypes)
    if complaint:
        verdict.refused["ours"] = complaint
    for name, function in functions.items():
        if name in found or complaint:
            continue
        results, why = attempt(_evaluate, built, function, given)
        if why is None and name not in uncapped:
            found[name], why = attempt(_compare, results, truths)
        if why:
            verdict.refused[name] = why
        del results
    for name, by_tensor in found.items():
        if by_tensor:
            worst = torch.stack(list(by_tensor.values()))
            verdict.errors[name] = worst[:, 0].max().item() if not worst.isnan().any() else float("nan")
            if name not in ("ours", "eager") and not verdict.errors[name] <= LARGEST_ERROR:
                verdict.refused[name] = f"computes something else: error {verdict.errors[name]:.3g}"
    return verdict


def call(built: Built, function: Callable, mode: str, given: list[Tensor]) -> Callable[[], object]:
    """What is timed."""
    if mode == "forward":
        return lambda: built.forward(function)
    if mode == "full":
        return lambda: built.backward(built.forward(function), given)
    outputs = built.forward(function)
    return lambda: built.backward(outputs, given, retain_graph=True)


def device_times(function: Callable[[], object]) -> list[float]:
    """Milliseconds on the GPU, between events, the L2 cache flushed before each call."""
    from triton.testing import do_bench

    return do_bench(function, warmup=WARM_UP_MS, rep=REPEAT_MS, return_mode="all")


def one_time(function: Callable[[], object]) -> list[float]:
    """Milliseconds of one call on the CPU: shows that it runs, not how fast it is."""
    before = time.perf_counter()
    function()
    return [1e3 * (time.perf_counter() - before)]


def interleaved(calls: dict[str, Callable], clock: Callable, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """The times of each, from rounds in which all take turns, every second one backwards."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds):
        for name in list(calls)[:: -1 if index % 2 else 1]:
            times[name] += clock(calls[name])
    return times


def quantiles(times: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile in milliseconds."""
    tenths = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else times * 9
    return {"ms": statistics.median(times), "ms_p20": tenths[1], "ms_p80": tenths[7]}


def host_ms(function: Callable[[], object], calls: int = 5) -> float:
    """What a call costs the CPU; where it exceeds the time on the GPU, the GPU waits."""
    torch.cuda.synchronize()
    before = time.perf_counter()
    for _ in range(calls):
        function()
    taken = time.perf_counter() - before
    torch.cuda.synchronize()
    return 1e3 * taken / calls


def peak_mib(function: Callable[[], object]) -> float:
    """The most memory a call has above what was there before."""
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def machine() -> dict[str, float]:
    """The GPU's own copy bandwidth (bytes read and written) and bf16 matmul rate, random data."""
    source = torch.randn(2**29, device="cuda", dtype=torch.bfloat16)
    copy = statistics.median(device_times(partial(torch.empty_like(source).copy_, source)))
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    product = statistics.median(device_times(lambda: a @ b))
    return {"copy_gbps": 4 * 2**29 / copy / 1e6, "matmul_tflops": 2 * 8192**3 / product / 1e9}
