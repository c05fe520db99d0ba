"""Speed of every kernel at the shapes of training: ``python -m benchmarks.kernels [--ops NAME ...] [--cases LABEL]``.

Compares each kernel with eager PyTorch and torch.compile; `benchmarks.attention` compares attention with other
implementations in the same way. Ours is first compared with its reference, in the same dtype and in float64, and not
timed if it is wrong (exit code 1). Every implementation is timed forward, and forward and backward (full; backward is
the difference), between device events, L2 flushed, in rounds of alternating order, with random inputs and cotangents.
Bandwidth and rate are also given as shares of the GPU's own copy bandwidth and matmul rate, which are measured first.
Results are written after each case. Without a GPU: exit code 2, or ``--tiny``, which shows that everything runs.
"""

import os
import sys
from collections.abc import Callable

if "--tiny" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is imported

import torch
from torch import Tensor

from benchmarks import record, timing
from benchmarks.cases import CASES, TINY_CASES, Case
from benchmarks.timing import attempt, free, quantiles
from benchmarks.tolerance import allowed, errors, evaluate
from fastalign.kernels.common import INTERPRETED

KEY = ("op", "label", "implementation", "mode")
MODES = {"forward": slice(1), "backward": slice(1, 2), "full": slice(2)}
"""Mode -> which of (forward, backward) it has."""
ROUNDS = 3
LARGEST_ERROR = 0.05
"""An implementation with a larger error computes another function and is not timed."""
Implementations = Callable[[Case, dict, bool], tuple[dict[str, Callable], set[str]]]
"""(case, inputs, tiny) -> functions by name, "ours" and "eager" among them; names of those without the soft-cap."""


def implementations(case: Case, inputs: dict, tiny: bool) -> tuple[dict[str, Callable], set[str]]:
    """The kernel, its reference, and the compiled reference."""
    functions = {"ours": case.kernel, "eager": case.reference}
    if case.compiles:
        options = {"backend": "aot_eager"} if tiny else {}
        functions["compile"] = torch.compile(case.reference, fullgraph=True, dynamic=False, **options)
    return functions, set()


def _compare(results: dict[str, Tensor], truths: dict[str, Tensor]) -> dict[str, Tensor]:
    for name, truth in truths.items():
        if results[name].shape != truth.shape:
            raise ValueError(f"{name} is {list(results[name].shape)}, not {list(truth.shape)}")
    return {name: errors(results[name], truth) for name, truth in truths.items()}


def check(
    case: Case, inputs: dict, functions: dict[str, Callable], uncapped: set[str]
) -> tuple[dict[str, float], dict[str, str], list[Tensor]]:
    """Compare every implementation, forward and backward, with the reference in float64.

    Those in `uncapped` have no soft-cap and only have to run. Returns the largest relative errors and the reasons for
    not timing, by implementation; random cotangents.
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
    return lambda: case.backward(inputs, function(**inputs), cotangents)


def time_modes(
    case: Case, inputs: dict, functions: dict, cotangents: list[Tensor], tiny: bool
) -> tuple[dict[str, dict], dict[tuple[str, str], str]]:
    """Times by mode and implementation, and reasons for missing times by implementation and mode."""
    times, failed = {}, {}
    for mode in ("forward", "full"):
        calls = {}
        for name, function in functions.items():
            if (name, "forward") in failed:
                continue
            run = call(case, inputs, function, mode, cotangents)
            if why := attempt(run)[1]:  # compiles, selects algorithms, may run out of memory
                failed[name, mode] = why
            else:
                calls[name] = run
        times[mode] = {name: [] for name in calls}
        for name in timing.in_turns(list(calls), 1 if tiny else ROUNDS):
            # In the interpreter one call shows that it runs.
            one = [1e3 * timing.timed(calls[name], 1, "cpu")[0]] if tiny else timing.device_times(calls[name])
            times[mode][name] += one
        calls.clear()
        free(cotangents[0].device.type)
    return times, failed


def figures(case: Case, mode: str, ms: float, limits: dict) -> dict:
    """Bandwidth and rate, and their shares of the GPU's."""
    moved, operations = (sum(each(case.batch)[MODES[mode]]) for each in (case.bytes, case.operations))
    row = {"bytes": moved}
    if not limits or not ms > 0:
        return row
    if moved:
        row["gbps"] = moved / ms / 1e6
        row["copy_share"] = row["gbps"] / limits["copy_gbps"]
    if operations:
        row["tflops"] = operations / ms / 1e9
        row["matmul_share"] = row["tflops"] / limits["matmul_tflops"]
    return row


def rows_of(case: Case, base: dict, times: dict, largest: dict[str, float], limits: dict) -> list[dict]:
    """One row per implementation and mode."""
    medians = {mode: {n: quantiles(t) for n, t in by_name.items()} for mode, by_name in times.items()}
    medians["backward"] = {
        name: {"ms": full["ms"] - medians["forward"][name]["ms"], "derived": "full - forward"}
        for name, full in medians["full"].items()
    }
    rows = []
    for mode in MODES:
        for name, found in medians[mode].items():
            row = {**base, "implementation": name, "mode": mode, **found}
            row |= figures(case, mode, found["ms"], limits)
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
        wrong = {"error": largest.get("ours"), "wrong": why != timing.NO_MEMORY}
        return [base | {"implementation": "ours", "failed": why} | wrong]
    functions = {name: function for name, function in functions.items() if name not in refused}
    times, failed = time_modes(case, inputs, functions, cotangents, tiny)
    rows = rows_of(case, base, times, largest, limits)
    for row in rows:
        if row["implementation"] in uncapped:
            row["computes"] = "without the cap"
        elif row["mode"] == "full" and not tiny:
            run = call(case, inputs, functions[row["implementation"]], "full", cotangents)
            row |= {"host_ms": timing.host_ms(run), "peak_mib": timing.peak_mib(run)}
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


def run(
    name: str, description: str, cases: list[Case], tiny_cases: list[Case], implementations: Implementations,
    arguments: list[str] | None, save: Callable[[list[dict]], object] = lambda rows: None,
) -> int:  # fmt: skip
    """Measure, print, write `NAME.json` after each case; `save` gets the rows too. 1: ours is wrong, 2: no GPU."""
    parser = record.parser(name, description, "tiny shapes in the interpreter")
    names = sorted({case.name for case in cases})
    parser.add_argument("--ops", nargs="+", choices=names, default=names, help="only these operations")
    parser.add_argument("--cases", nargs="+", metavar="LABEL", help="only labels that start so: B/16-224")
    parser.add_argument("--once", action="store_true", help="run each case once, unmeasured, for a profiler")
    options = parser.parse_args(arguments)
    cases = [case for case in (tiny_cases if options.tiny else cases) if case.name in options.ops]
    for start in options.cases or ():
        if not any(case.label.startswith(start) for case in cases):
            labels = ", ".join(sorted({case.label for case in cases}))
            parser.error(f"--cases: no case starts with {start!r}; choose from {labels}")
    cases = [case for case in cases if case.label.startswith(tuple(options.cases or [""]))]
    if not options.tiny and not torch.cuda.is_available():
        print(f"benchmarks.{name} needs a GPU; --tiny shows on a CPU that it runs", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    device = "cpu" if INTERPRETED else "cuda"
    if options.once:
        for case in cases:
            case.run(device, case.batch)
        return 0
    limits = {} if options.tiny else timing.machine()
    if limits:
        print("copy {copy_gbps:.0f} GB/s, bf16 matmul {matmul_tflops:.0f} TFLOP/s".format(**limits))
    rows = []
    for case in cases:
        new = measure_case(case, device, limits, implementations, options.tiny)
        show(new)
        rows += new
        if not options.tiny:
            record.write(name, rows, {"limits": limits}, KEY)
            save(rows)
    return int(any(row.get("wrong") for row in rows))


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; the exit code."""
    return run("kernels", __doc__, CASES, TINY_CASES, implementations, arguments)


if __name__ == "__main__":
    sys.exit(main())
