"""Ours against others, case by case: what `benchmarks.kernels` and `benchmarks.attention` have in common.

For each case ours is compared with its reference, in the same dtype and in float64, and not timed if it is wrong
(exit code 1); forward, backward and full (forward and backward) of every implementation are timed between device
events, L2 flushed, in rounds in which all take turns in alternating order. Random inputs and cotangents. The result
is written after every case; ``--budget SECONDS`` ends a run early, and ``--resume`` goes on where one of the same
sources, versions and GPU ended, and at its end measures again the cases in which ours failed, unless for want of
memory. Without a GPU: exit code 2, or ``--tiny``, which shows that everything runs.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch._functorch.config

from benchmarks import measure, plots, record
from benchmarks.cases import Built, Case
from benchmarks.targets import summary
from fastalign.kernels.common import INTERPRETED


@dataclass(frozen=True)
class Benchmark:
    """What is measured and how it is judged.

    Args:
        name: of the result.
        cases, tiny: on a GPU, and where speed means nothing.
        implementations: (case, built, tiny) -> functions by name, "ours" and "eager" among them; those that could not
            be prepared, with the reason; names of those that compute something else on purpose.
        targets: judges the rows.
        sources: patterns of the files that the figures depend on.
    """

    name: str
    cases: list[Case]
    tiny: list[Case]
    implementations: Callable
    targets: Callable[[list[dict]], list[dict]]
    sources: tuple[str, ...]


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


def rows_of(case: Case, times: dict, verdict: measure.Verdict, extras: dict, limits: dict) -> list[dict]:
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
            row |= {"error": verdict.errors.get(name), "checked_batch": verdict.batch}
            rows.append(row | extras.get((name, mode), {}))
    return rows


def costs(built: Built, functions: dict, names: list[str], given: list[torch.Tensor]) -> dict:
    """Host time and peak memory by implementation and mode."""
    found = {}
    for name in names:
        for mode in ("forward", "full"):
            timed = measure.call(built, functions[name], mode, given)
            found[name, mode] = {"host_ms": measure.host_ms(timed)}
        found[name, "full"]["peak_mib"] = measure.peak_mib(timed)
    return found


def measure_case(case: Case, device: str, limits: dict, implementations: Callable, tiny: bool) -> list[dict]:
    """All rows of a case, those without a time too."""
    torch._dynamo.reset()
    measure.free(device)
    base = {"op": case.name, "label": case.label, "batch": case.batch, **case.options}
    built, why = measure.attempt(case.build, device, case.batch)
    if why:
        return [base | {"implementation": "ours", "failed": why}]
    functions, failed, yardsticks = implementations(case, built, tiny)
    verdict, why = measure.attempt(measure.fitting_check, case, built, functions, yardsticks, device)
    verdict = verdict or measure.Verdict(refused={"ours": why})
    if "ours" in verdict.refused:
        row = {
            "implementation": "ours",
            "failed": verdict.refused["ours"],
            "error": verdict.errors.get("ours"),
        }
        return [base | row | {"wrong": row["failed"] != measure.NO_ROOM}]
    failed |= verdict.refused
    functions = {name: function for name, function in functions.items() if name not in failed}
    given = measure.cotangents(built)
    clock, rounds = (measure.one_time, 1) if tiny else (measure.device_times, measure.ROUNDS)
    times, unmeasured = time_modes(built, functions, given, clock, rounds)
    extras = {} if tiny else costs(built, functions, list(times["full"]), given)
    for name, mode in itertools.product(yardsticks, measure.MODES):
        extras.setdefault((name, mode), {})["computes"] = "without the cap"
    rows = rows_of(case, times, verdict, extras, limits)
    rows += [base | {"implementation": name, "failed": why} for name, why in failed.items()]
    rows += [base | {"implementation": n, "mode": m, "failed": why} for (n, m), why in unmeasured.items()]
    return rows


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


def _select(cases: list[Case], options: argparse.Namespace) -> list[Case]:
    """The cases asked for."""
    names, labels = {case.name for case in cases}, [case.label for case in cases]
    for name in options.ops or ():
        if name not in names:
            raise SystemExit(f"no operation {name}; there are {', '.join(sorted(names))}")
    for model in options.models or ():
        if not any(label.startswith(model) for label in labels):
            raise SystemExit(f"no case starts with {model}; there are {', '.join(sorted(set(labels)))}")
    return [
        case
        for case in cases
        if (not options.ops or case.name in options.ops)
        and (not options.models or case.label.startswith(tuple(options.models)))
    ]


def _key(row: dict) -> tuple[str, str]:
    return row["op"], row["label"]


def _run(benchmark: Benchmark, cases: list[Case], options: argparse.Namespace, started: float) -> list[dict]:
    """Measure on the GPU; rows of earlier parts included."""
    found = record.identity(benchmark.sources)
    earlier = record.resume(benchmark.name, found) if options.resume else {}
    rows, runs = earlier.get("rows", []), earlier.get("runs", [])
    by_key = {(case.name, case.label): case for case in cases}
    left = record.left(list(by_key), rows, _key)
    if not left:
        print("every case is measured already")
        return rows
    limits = measure.machine()
    runs.append(record.environment() | limits)
    print("copy {copy_gbps:.0f} GB/s, bf16 matmul {matmul_tflops:.0f} TFLOP/s".format(**limits))
    longest = 0.0
    for index, key in enumerate(left):
        before = time.perf_counter()
        if options.budget and before - started + longest > options.budget:
            print(f"budget spent, {len(left) - index} cases left: run again with --resume")
            break
        new = measure_case(by_key[key], "cuda", limits, benchmark.implementations, tiny=False)
        show(new)
        rows = [row for row in rows if _key(row) != key] + new
        extra = {"identity": found, "runs": runs, "targets": benchmark.targets(rows)}
        record.write(benchmark.name, rows, extra)
        longest = max(longest, time.perf_counter() - before)
    plots.draw(benchmark.name)
    return rows


def run(benchmark: Benchmark, description: str, arguments: list[str] | None) -> tuple[int, list[dict]]:
    """Measure, print, write. Returns the exit code, 1 if ours is wrong and 2 without a GPU, and the rows."""
    started = time.perf_counter()
    module = f"benchmarks.{benchmark.name}"
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description.splitlines()[0])
    parser.add_argument("--ops", nargs="+", metavar="NAME", help="only these operations")
    parser.add_argument(
        "--models", nargs="+", metavar="LABEL", help="only cases whose label starts so: B/16-224"
    )
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="begin no case that may end later")
    parser.add_argument("--resume", action="store_true", help="keep the results of earlier parts")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes in the interpreter, nothing written")
    options = parser.parse_args(arguments)
    cases = _select(benchmark.tiny if options.tiny else benchmark.cases, options)
    if not options.tiny and not torch.cuda.is_available():
        print(f"{module} needs a GPU; --tiny shows on a CPU that it runs", file=sys.stderr)
        return 2, []
    torch.manual_seed(0)
    # Saved tensors are kept for a second backward pass, which costs torch.compile memory, not time.
    with torch._functorch.config.patch(donated_buffer=False):
        if options.tiny:
            device, rows = "cpu" if INTERPRETED else "cuda", []
            for case in cases:
                new = measure_case(case, device, {}, benchmark.implementations, tiny=True)
                show(new)
                rows += new
        else:
            rows = _run(benchmark, cases, options, started)
    print(summary(benchmark.targets(rows)))
    return int(any(row.get("wrong") for row in rows)), rows
