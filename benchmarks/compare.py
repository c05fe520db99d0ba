"""Ours against others, case by case: what `benchmarks.kernels` and `benchmarks.attention` have in common.

For each case ours is compared with its reference, in the same dtype and in float64, and not timed if it is wrong
(exit code 1). Forward, backward and full (forward and backward) of every implementation are timed between device
events, L2 flushed, in rounds of alternating order, with random inputs and cotangents. Bandwidth and rate are also
given as shares of the GPU's own copy bandwidth and matmul rate, which are measured first. The result is written after
every case. Without a GPU: exit code 2, or ``--tiny``, which shows that everything runs.
"""

import argparse
import sys
from collections.abc import Callable

import torch
import torch._functorch.config

from benchmarks import measure, record
from benchmarks.cases import Built, Case
from fastalign.kernels.common import INTERPRETED

KEY = ("op", "label", "implementation", "mode")
Implementations = Callable[[Case, Built, bool], tuple[dict[str, Callable], set[str]]]
"""(case, built, tiny) -> functions by name, "ours" and "eager" among them; names of those without the soft-cap."""


def time_modes(
    built: Built, functions: dict, given: list[torch.Tensor], clock: Callable, rounds: int
) -> tuple[dict[str, dict], dict[tuple[str, str], str]]:
    """Times by mode and implementation, and why some have none, by implementation and mode."""
    times, failed = {}, {}
    for mode in measure.MODES:
        if mode == "backward" and not built.case.backward_alone:
            continue
        calls = {}
        for name, function in functions.items():
            if (name, "forward") in failed:
                continue
            timed, why = measure.attempt(measure.call, built, function, mode, given)
            why = why or measure.attempt(timed)[1]  # compiles, chooses algorithms, may not fit
            if why:
                failed[name, mode] = why
            else:
                calls[name] = timed
        times[mode] = measure.interleaved(calls, clock, rounds)
        calls.clear()
        measure.free(given[0].device.type)
    return times, failed


def figures(case: Case, mode: str, found: dict, limits: dict) -> dict:
    """What follows from a time: bandwidth, rate and their shares of what the GPU can do."""
    forward, backward = case.bytes(case.batch)
    moved = {"forward": forward, "backward": backward, "full": forward + backward}[mode]
    forward, backward = case.operations(case.batch)
    operations = {"forward": forward, "backward": backward, "full": forward + backward}[mode]
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


def rows_of(case: Case, times: dict, verdict: measure.Verdict, limits: dict) -> list[dict]:
    """One row an implementation and mode."""
    medians = {mode: {n: measure.quantiles(t) for n, t in by_name.items()} for mode, by_name in times.items()}
    if "backward" not in medians:
        medians["backward"] = {
            name: {"ms": full["ms"] - medians["forward"][name]["ms"], "derived": "full - forward"}
            for name, full in medians["full"].items()
        }
    rows = []
    for mode in measure.MODES:
        for name, found in medians[mode].items():
            row = {"op": case.name, "label": case.label, "batch": case.batch, **case.options}
            row |= {"implementation": name, "mode": mode, **found, **figures(case, mode, found, limits)}
            others = {other: value["ms"] for other, value in medians[mode].items() if other != name}
            # Times in the interpreter, where there are no limits, compare nothing.
            compares = limits and found["ms"] > 0
            row["times_faster_than"] = {n: ms / found["ms"] for n, ms in others.items()} if compares else {}
            rows.append(row | {"error": verdict.errors.get(name)})
    return rows


def measure_case(
    case: Case, device: str, limits: dict, implementations: Implementations, tiny: bool
) -> list[dict]:
    """All rows of a case; those that have no time say why."""
    torch._dynamo.reset()
    measure.free(device)
    base = {"op": case.name, "label": case.label, "batch": case.batch, **case.options}
    built, why = measure.attempt(case.build, device, case.batch)
    if why:
        return [base | {"implementation": "ours", "failed": why}]
    functions, uncapped = implementations(case, built, tiny)
    verdict, why = measure.attempt(measure.check, built, functions, uncapped)
    verdict = verdict or measure.Verdict(refused={"ours": why})
    if why := verdict.refused.get("ours"):
        row = {"implementation": "ours", "failed": why, "error": verdict.errors.get("ours")}
        return [base | row | {"wrong": why != measure.NO_ROOM}]
    functions = {name: function for name, function in functions.items() if name not in verdict.refused}
    given = measure.cotangents(built)
    clock, rounds = (measure.one_time, 1) if tiny else (measure.device_times, measure.ROUNDS)
    times, failed = time_modes(built, functions, given, clock, rounds)
    rows = rows_of(case, times, verdict, limits)
    for row in rows:
        if row["implementation"] in uncapped:
            row["computes"] = "without the cap"
        elif row["mode"] == "full" and not tiny:
            timed = measure.call(built, functions[row["implementation"]], "full", given)
            row |= {"host_ms": measure.host_ms(timed), "peak_mib": measure.peak_mib(timed)}
    rows += [base | {"implementation": name, "failed": why} for name, why in verdict.refused.items()]
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


def select(cases: list[Case], ops: list[str] | None, labels: list[str] | None) -> list[Case]:
    """The cases asked for: by operation, and by how their labels start."""
    for name in ops or ():
        if name not in {case.name for case in cases}:
            raise SystemExit(
                f"--ops: no operation {name}; there are {', '.join(sorted({c.name for c in cases}))}"
            )
    for start in labels or ():
        if not any(case.label.startswith(start) for case in cases):
            known = ", ".join(sorted({case.label for case in cases}))
            raise SystemExit(f"--cases: no case starts with {start!r}; there are {known}")
    return [
        case
        for case in cases
        if (not ops or case.name in ops) and (not labels or case.label.startswith(tuple(labels)))
    ]


def main(
    name: str,
    description: str,
    cases: list[Case],
    tiny_cases: list[Case],
    implementations: Implementations,
    arguments: list[str] | None,
) -> tuple[int, list[dict]]:
    """Measure, print, write `NAME.json`. Returns the exit code (1: ours is wrong, 2: no GPU) and the rows."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=description.splitlines()[0]
    )
    parser.add_argument("--ops", nargs="+", metavar="NAME", help="only these operations")
    parser.add_argument(
        "--cases", nargs="+", metavar="LABEL", help="only cases whose label starts so: B/16-224"
    )
    parser.add_argument(
        "--once", action="store_true", help="run each case once, for a profiler; measures nothing"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny shapes in the interpreter, nothing written")
    options = parser.parse_args(arguments)
    cases = select(tiny_cases if options.tiny else cases, options.ops, options.cases)
    if not options.tiny and not torch.cuda.is_available():
        print(f"benchmarks.{name} needs a GPU; --tiny shows on a CPU that it runs", file=sys.stderr)
        return 2, []
    torch.manual_seed(0)
    device = "cpu" if INTERPRETED else "cuda"
    if options.once:
        for case in cases:
            case.build(device, case.batch).run()
        return 0, []
    limits = {} if options.tiny else measure.machine()
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
