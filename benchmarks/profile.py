"""Where the time of one training step goes: ``python -m benchmarks.profile [BACKBONE] [--mode drop] [--tiny]``.

Runs the compiled step of `benchmarks.step` under torch's profiler after warm-up; writes a trace for Perfetto to
`benchmarks/results/profile.trace.json.gz` (not for the repository) and the table of the costliest operations to
`benchmarks/results/profile.json`. With ``--tiny`` the step is eager, and nothing is written.
"""

import argparse
import sys

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import record
from benchmarks.step_bench import BACKBONES, MODES, SMALL, TINY_KWARGS, Row, StepBench

STEPS, TOP = 3, 30


def profiled(bench: StepBench, warm_up: int, steps: int):
    """The profile of some steps after the warm-up."""
    cuda = bench.images.is_cuda
    for _ in range(warm_up):
        bench.step()
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as found:
        for _ in range(steps):
            bench.step()
        if cuda:
            torch.cuda.synchronize()
    return found


def table(found, steps: int, cuda: bool) -> list[dict]:
    """The operations with the most own time, in milliseconds a step and share of all."""
    own = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = [event for event in found.key_averages() if getattr(event, own) > 0]
    # On a GPU an operator and the kernel that it launches both carry the time: count kernels alone.
    if cuda:
        events = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    total = sum(getattr(event, own) for event in events)
    events = sorted(events, key=lambda event: getattr(event, own), reverse=True)[:TOP]
    return [
        {
            "operation": event.key[:120],
            "ms_a_step": getattr(event, own) / 1e3 / steps,
            "share": getattr(event, own) / total,
            "calls_a_step": event.count / steps,
        }
        for event in events
    ]


def main(arguments: list[str] | None = None) -> list[dict]:
    """Profile, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__.splitlines()[0])
    parser.add_argument("backbone", nargs="?", choices=BACKBONES, default=next(iter(BACKBONES)))
    parser.add_argument("--mode", choices=MODES, default="zero", help="implementation")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: checks that it runs")
    options = parser.parse_args(arguments)
    if not (options.tiny or torch.cuda.is_available()):
        sys.exit("benchmarks.profile needs a GPU; --tiny shows on a CPU that it runs")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name, kwargs = ("tiny", TINY_KWARGS) if options.tiny else (options.backbone, {})
    row = Row(name, options.mode, compiled="eager" if options.tiny else "compiled")
    bench = StepBench(row, (BACKBONES | SMALL)[name][1], device, **kwargs)
    steps = 1 if options.tiny else STEPS
    found = profiled(bench, steps, steps)
    rows = table(found, steps, device.type == "cuda")
    for entry in rows:
        print(
            "{ms_a_step:9.3f} ms {0:5.1f} % {calls_a_step:7.1f}x  {operation}".format(
                100 * entry["share"], **entry
            )
        )
    if not options.tiny:
        path = record.write("profile", rows, {"step": str(row), "batch": len(bench.images)})
        found.export_chrome_trace(str(path.with_suffix(".trace.json.gz")))
    return rows


if __name__ == "__main__":
    main()
