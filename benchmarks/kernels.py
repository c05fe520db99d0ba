"""Speed of every kernel at the shapes of training: ``python -m benchmarks.kernels [--ops NAME ...] [--resume]``.

First the GPU's own copy bandwidth and matmul rate. Then for each case of `benchmarks.cases`: the kernel is
compared with its reference, in the same dtype and in float64, and not timed if it is wrong (exit code 1);
forward, backward and full (forward and backward) of the kernel, eager PyTorch, torch.compile of it and the rivals
of `benchmarks.attention_rivals` are timed between device events, L2 flushed, in rounds in which all take turns in
alternating order. Random inputs and cotangents. torch.compile keeps its saved tensors for a second backward pass
(donated_buffer off), which costs it memory, not time.

`benchmarks/results/kernels.json` is written after every case; ``--budget SECONDS`` ends a run early, and
``--resume`` goes on where one of the same sources, versions and GPU ended. Without a GPU: exit code 2, or
``--tiny``, each operation at a tiny shape in Triton's interpreter, which shows that everything runs.
"""

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable

if "--tiny" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is imported

import torch
import torch._functorch.config

from benchmarks import measure, record
from benchmarks.attention_rivals import RIVALS
from benchmarks.cases import CASES, TINY_CASES, Built, Case
from benchmarks.targets import ATTENTION, summary, targets
from fastalign.kernels.common import INTERPRETED

SOURCES = (
    "kernels/*.py",
    "fastalign/reference.py",
    *(f"benchmarks/{name}.py" for name in ("attention_rivals", "cases", "kernels", "measure")),
)
"""What its figures depend on: a change of a model does not make them stale."""


def implementations(case: Case, built: Built, tiny: bool) -> tuple[dict[str, Callable], dict[str, str], set]:
    """Functions by name; those that could not be prepared, with the reason; those that leave out the cap."""
    functions, failed, yardsticks = {"ours": case.kernel, "eager": case.reference}, {}, set()
    if case.compiles:
        options = {"backend": "aot_eager"} if tiny else {}
        functions["compile"] = torch.compile(case.reference, fullgraph=True, dynamic=False, **options)
    if case.name != ATTENTION:
        return functions, failed, yardsticks
    q = built.inputs["q"]
    softcap, packed = case.options["softcap"], case.options["packed"]
    for name, rival in RIVALS.items():
        if not rival.supports(softcap, packed, q.dtype, q.device.type) or rival.missing():
            continue
        arguments = (softcap, built.inputs.get("cu_seqlens"), built.inputs.get("max_seqlen"))
        run, why = measure.attempt(rival.prepare, *arguments)
        if why:
            failed[name] = why
            continue
        functions[name] = lambda q, k, v, run=run, **_: run(q, k, v)
        if softcap is not None and not rival.capped:
            yardsticks.add(name)
    return functions, failed, yardsticks


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


def measure_case(case: Case, device: str, limits: dict, tiny: bool) -> list[dict]:
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


def select(options: argparse.Namespace) -> list[Case]:
    """The cases asked for."""
    cases = TINY_CASES if options.tiny else CASES
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


def run(cases: list[Case], options: argparse.Namespace, started: float) -> list[dict]:
    """Measure on the GPU; rows of earlier parts included."""
    found = record.identity(SOURCES)
    earlier = record.resume("kernels", found) if options.resume else {}
    rows, runs = earlier.get("rows", []), earlier.get("runs", [])
    done = {(row["op"], row["label"]) for row in rows}
    left = [case for case in cases if (case.name, case.label) not in done]
    if not left:
        print("every case is measured already")
        return rows
    limits = measure.machine()
    runs.append(record.environment() | limits)
    print("copy {copy_gbps:.0f} GB/s, bf16 matmul {matmul_tflops:.0f} TFLOP/s".format(**limits))
    for name, rival in RIVALS.items():
        if any(case.name == ATTENTION for case in left) and rival.missing():
            print(f"no {name}: {rival.missing()}")
    longest = 0.0
    for index, case in enumerate(left):
        before = time.perf_counter()
        if options.budget and before - started + longest > options.budget:
            print(f"budget spent, {len(left) - index} cases left: run again with --resume")
            break
        new = measure_case(case, "cuda", limits, tiny=False)
        show(new)
        rows += new
        record.write("kernels", rows, {"identity": found, "runs": runs, "targets": targets(rows)})
        longest = max(longest, time.perf_counter() - before)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; 1 if a kernel is wrong, 2 without a GPU."""
    started = time.perf_counter()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="+", metavar="NAME", help="only these operations")
    parser.add_argument(
        "--models", nargs="+", metavar="LABEL", help="only cases whose label starts so: B/16-224"
    )
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="begin no case that may end later")
    parser.add_argument("--resume", action="store_true", help="keep the results of earlier parts")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes in the interpreter, nothing written")
    options = parser.parse_args(arguments)
    cases = select(options)
    if not options.tiny and not torch.cuda.is_available():
        print("benchmarks.kernels needs a GPU; --tiny shows on a CPU that it runs", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    with torch._functorch.config.patch(donated_buffer=False):
        if options.tiny:
            device, rows = "cpu" if INTERPRETED else "cuda", []
            for case in cases:
                new = measure_case(case, device, {}, tiny=True)
                show(new)
                rows += new
        else:
            rows = run(cases, options, started)
    print(summary(targets(rows)))
    return 1 if any(row.get("wrong") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
