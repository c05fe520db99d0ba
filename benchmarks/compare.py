"""Our kernels against other implementations: shared by `benchmarks.kernels` and `benchmarks.attention`.

For each case ours is compared with its reference, in the same dtype and in float64, and not timed if it is wrong
(exit code 1). Forward, backward and full (both) passes of every implementation are timed between device events, L2
flushed, in rounds of alternating order, with random inputs and cotangents. Bandwidth and rate are also given as
shares of the GPU's own copy bandwidth and matmul rate, which are measured first. Results are written after each
case. Without a GPU: exit code 2, or ``--tiny``, which shows that everything runs.
"""

import gc
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
import torch._functorch.config
from torch import Tensor

from benchmarks import record
from benchmarks.cases import Case
from benchmarks.tolerance import allowed, errors, evaluate
from fastalign.kernels.common import INTERPRETED

KEY = ("op", "label", "implementation", "mode")
MODES = ("forward", "backward", "full")
NO_MEMORY = "out of memory"
ROUNDS, WARM_UP_MS, REPEAT_MS = 3, 10, 40
LARGEST_ERROR = 0.05
"""An implementation with a larger error computes another function and is not timed."""
Implementations = Callable[[Case, dict, bool], tuple[dict[str, Callable], set[str]]]
"""(case, inputs, tiny) -> functions by name, "ours" and "eager" among them; names of those without the soft-cap."""


def free(device: str) -> None:
    """Release unused memory."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def attempt(function: Callable, *arguments) -> tuple[object, str | None]:
    """The result, or None and the reason in one line; no traceback keeps memory alive."""
    try:
        return function(*arguments), None
    except torch.OutOfMemoryError:
        return None, NO_MEMORY
    except Exception as error:  # a library may raise anything
        return None, f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]


def _compare(results: dict[str, Tensor], truths: dict[str, Tensor]) -> dict[str, Tensor]:
    for name, truth in truths.items():
        if results[name].shape != truth.shape:
            raise ValueError(f"{name} is {list(results[name].shape)}, not {list(truth.shape)}")
    return {name: errors(results[name], truth) for name, truth in truths.items()}


def check(
    case: Case, inputs: dict, functions: dict[str, Callable], uncapped: set[str]
) -> tuple[dict[str, float], dict[str, str], list[Tensor]]:
    """Compare every implementation, forward and backward, with the reference in float64.

    Args:
        case, inputs: the operation.
        functions: implementations by name; `ours` and `eager` are among them.
        uncapped: those without the soft-cap, which only have to run.

    Returns:
        The largest relative errors and the reasons for not timing, by implementation; random cotangents.
    """
    # Ours runs first, so that memory that it forgets to write does not hold correct values by chance.
    ours, cotangents = evaluate(functions["ours"], inputs, case.leaves)
    dtypes = {name: value.dtype for name, value in ours.items()}
    truths, _ = evaluate(case.reference, inputs, case.leaves, cotangents, torch.float64)
    found = {"ours": _compare(ours, truths)}
    del ours
    found["eager"] = _compare(evaluate(functions["eager"], inputs, case.leaves, cotangents)[0], truths)
    largest, refused = {}, {}
    for name, error in found["ours"].items():
        bound = allowed(found["eager"][name], dtypes[name])
        if not bool((error <= bound).all()):  # NaN is wrong as well
            refused["ours"] = f"wrong: {name} has error {error.tolist()}, allowed {bound.tolist()}"
            break
    for name in [] if refused else [name for name in functions if name not in found]:
        results, why = attempt(evaluate, functions[name], inputs, case.leaves, cotangents)
        if why is None and name not in uncapped:
            found[name], why = attempt(_compare, results[0], truths)
        if why:
            refused[name] = why
        del results
    for name, by_tensor in found.items():
        if by_tensor:
            worst = torch.stack(list(by_tensor.values()))
            largest[name] = worst[:, 0].max().item() if not worst.isnan().any() else float("nan")
            if name not in ("ours", "eager") and not largest[name] <= LARGEST_ERROR:
                refused[name] = f"computes another function: error {largest[name]:.3g}"
    return largest, refused, cotangents


def call(case: Case, inputs: dict, function: Callable, mode: str, cotangents: list[Tensor]) -> Callable:
    """The function that is timed."""
    if mode == "forward":
        return lambda: function(**inputs)
    if mode == "full":
        return lambda: case.backward(inputs, function(**inputs), cotangents)
    outputs = function(**inputs)
    return lambda: case.backward(inputs, outputs, cotangents, retain_graph=True)


def device_times(function: Callable[[], object]) -> list[float]:
    """Milliseconds on the GPU, between events, the L2 cache flushed before each call."""
    from triton.testing import do_bench

    return do_bench(function, warmup=WARM_UP_MS, rep=REPEAT_MS, return_mode="all")


def one_time(function: Callable[[], object]) -> list[float]:
    """Milliseconds of one call on the CPU, for --tiny."""
    return [1e3 * seconds for seconds in timed(function, 1, False)]


def timed(
    function: Callable[[], object], calls: int, cuda: bool, clock: Callable[[], float] = time.process_time
) -> list[float]:
    """Seconds of each call: between events on a GPU, where calls are queued, by the clock on a CPU."""

    def mark():
        if not cuda:
            return clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    marks = [mark()]
    for _ in range(calls):
        function()
        marks.append(mark())
    if not cuda:
        return [after - before for before, after in pairwise(marks)]
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in pairwise(marks)]


def interleaved(calls: dict[str, Callable], clock: Callable, rounds: int) -> dict[str, list[float]]:
    """The times of each, from rounds in which all take turns, every second round in reverse order."""
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
    """CPU time of a call; if it exceeds the time on the GPU, the GPU is idle."""
    torch.cuda.synchronize()
    before = time.perf_counter()
    for _ in range(calls):
        function()
    taken = time.perf_counter() - before
    torch.cuda.synchronize()
    return 1e3 * taken / calls


def peak_mib(function: Callable[[], object]) -> float:
    """Peak memory of a call above what was allocated before."""
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


def time_modes(
    case: Case, inputs: dict, functions: dict, cotangents: list[Tensor], clock: Callable, rounds: int
) -> tuple[dict[str, dict], dict[tuple[str, str], str]]:
    """Times by mode and implementation, and reasons for missing times by implementation and mode."""
    times, failed = {}, {}
    for mode in MODES:
        if mode == "backward" and not case.backward_alone:
            continue
        calls = {}
        for name, function in functions.items():
            if (name, "forward") in failed:
                continue
            run, why = attempt(call, case, inputs, function, mode, cotangents)
            why = why or attempt(run)[1]  # compiles, selects algorithms, may run out of memory
            if why:
                failed[name, mode] = why
            else:
                calls[name] = run
        times[mode] = interleaved(calls, clock, rounds)
        calls.clear()
        free(cotangents[0].device.type)
    return times, failed


def figures(case: Case, mode: str, found: dict, limits: dict) -> dict:
    """Bandwidth and rate, and their shares of the GPU's."""
    part = {"forward": slice(1), "backward": slice(1, 2), "full": slice(2)}[mode]
    moved, operations = (sum(each(case.batch)[part]) for each in (case.bytes, case.operations))
    row = {"bytes": moved}
    if not limits or not found["ms"] > 0:
        return row
    if moved:
        row["gbps"] = moved / found["ms"] / 1e6
        row["copy_share"] = row["gbps"] / limits["copy_gbps"]
    if operations:
        row["tflops"] = operations / found["ms"] / 1e9
        row["matmul_share"] = row["tflops"] / limits["matmul_tflops"]
    return row


def rows_of(case: Case, times: dict, largest: dict[str, float], limits: dict) -> list[dict]:
    """One row per implementation and mode."""
    medians = {mode: {n: quantiles(t) for n, t in by_name.items()} for mode, by_name in times.items()}
    if "backward" not in medians:
        medians["backward"] = {
            name: {"ms": full["ms"] - medians["forward"][name]["ms"], "derived": "full - forward"}
            for name, full in medians["full"].items()
        }
    rows = []
    for mode in MODES:
        for name, found in medians[mode].items():
            row = {"op": case.name, "label": case.label, "batch": case.batch, **case.options}
            row |= {"implementation": name, "mode": mode, **found, **figures(case, mode, found, limits)}
            others = {other: value["ms"] for other, value in medians[mode].items() if other != name}
            compares = limits and found["ms"] > 0  # not in the interpreter
            row["times_faster_than"] = {n: ms / found["ms"] for n, ms in others.items()} if compares else {}
            rows.append(row | {"error": largest.get(name)})
    return rows


def measure_case(
    case: Case, device: str, limits: dict, implementations: Implementations, tiny: bool
) -> list[dict]:
    """All rows of a case; a row without a time has the reason."""
    torch._dynamo.reset()
    free(device)
    base = {"op": case.name, "label": case.label, "batch": case.batch, **case.options}
    inputs, why = attempt(case.build, device, case.batch)
    if why:
        return [base | {"implementation": "ours", "failed": why}]
    functions, uncapped = implementations(case, inputs, tiny)
    checked, why = attempt(check, case, inputs, functions, uncapped)
    largest, refused, cotangents = checked or ({}, {"ours": why}, [])
    if why := refused.get("ours"):
        row = {
            "implementation": "ours",
            "failed": why,
            "error": largest.get("ours"),
            "wrong": why != NO_MEMORY,
        }
        return [base | row]
    functions = {name: function for name, function in functions.items() if name not in refused}
    clock, rounds = (one_time, 1) if tiny else (device_times, ROUNDS)
    times, failed = time_modes(case, inputs, functions, cotangents, clock, rounds)
    rows = rows_of(case, times, largest, limits)
    for row in rows:
        if row["implementation"] in uncapped:
            row["computes"] = "without the cap"
        elif row["mode"] == "full" and not tiny:
            run = call(case, inputs, functions[row["implementation"]], "full", cotangents)
            row |= {"host_ms": host_ms(run), "peak_mib": peak_mib(run)}
    rows += [base | {"implementation": name, "failed": why} for name, why in refused.items()]
    return rows + [base | {"implementation": n, "mode": m, "failed": why} for (n, m), why in failed.items()]


def show(rows: list[dict]) -> None:
    """Print the rows of a case."""
    for row in rows:
        start = f"{row['op']:26}{row['label']:36}{row['implementation']:17}"
        if "failed" in row:
            print(f"{start}not timed: {row['failed']}", flush=True)
            continue
        line = f"{start}{row['mode']:9}{row['ms']:9.3f} ms"
        line += f" [{row['ms_p20']:.3f}, {row['ms_p80']:.3f}]" if "ms_p20" in row else f" {row['derived']}"
        line += f"  {row['gbps']:6.0f} GB/s {100 * row['copy_share']:4.0f}%" if "gbps" in row else ""
        line += f"  {row['tflops']:5.0f} TFLOP/s {100 * row['matmul_share']:3.0f}%" if "tflops" in row else ""
        line += f"  {row['peak_mib']:8.0f} MiB" if "peak_mib" in row else ""
        if row["implementation"] == "ours":
            line += "".join(f"  {x:.2f}x {name}" for name, x in row["times_faster_than"].items())
        print(line, flush=True)


def main(
    name: str, description: str, cases: list[Case], tiny_cases: list[Case], implementations: Implementations,
    arguments: list[str] | None,
) -> tuple[int, list[dict]]:  # fmt: skip
    """Measure, print, write `NAME.json`. Returns the exit code (1: ours is wrong, 2: no GPU) and the rows."""
    parser = record.parser(name, description, "tiny shapes in the interpreter")
    names = sorted({case.name for case in cases})
    parser.add_argument("--ops", nargs="+", choices=names, default=names, help="only these operations")
    parser.add_argument("--cases", nargs="+", metavar="LABEL", help="only labels that start so: B/16-224")
    parser.add_argument(
        "--once", action="store_true", help="run each case once, for a profiler; measures nothing"
    )
    options = parser.parse_args(arguments)
    cases = [case for case in (tiny_cases if options.tiny else cases) if case.name in options.ops]
    for start in options.cases or ():
        if not any(case.label.startswith(start) for case in cases):
            labels = ", ".join(sorted({case.label for case in cases}))
            parser.error(f"--cases: no case starts with {start!r}; choose from {labels}")
    cases = [case for case in cases if case.label.startswith(tuple(options.cases or [""]))]
    if not options.tiny and not torch.cuda.is_available():
        print(f"benchmarks.{name} needs a GPU; --tiny shows on a CPU that it runs", file=sys.stderr)
        return 2, []
    torch.manual_seed(0)
    device = "cpu" if INTERPRETED else "cuda"
    if options.once:
        for case in cases:
            case.run(device, case.batch)
        return 0, []
    limits = {} if options.tiny else machine()
    if limits:
        print("copy {copy_gbps:.0f} GB/s, bf16 matmul {matmul_tflops:.0f} TFLOP/s".format(**limits))
    rows = []
    # Saved tensors are kept for a second backward pass, which costs torch.compile memory, not time.
    with torch._functorch.config.patch(donated_buffer=False):
        for case in cases:
            new = measure_case(case, device, limits, implementations, options.tiny)
            show(new)
            rows += new
            if not options.tiny:
                record.write(name, rows, {"limits": limits}, KEY)
    return int(any(row.get("wrong") for row in rows)), rows
