"""Profile of a training step: ``python -m benchmarks.profile [BACKBONE] [--mode drop] [--tiny]``.

Runs the compiled step of `benchmarks.step` under torch's profiler after warm-up. Writes a trace for Perfetto to
`benchmarks/results/profile.trace.json.gz` (not committed) and the costliest operations to
`benchmarks/results/profile.json`. With ``--tiny`` the step is eager, and nothing is written.
"""

import sys

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import record
from benchmarks.step_bench import BACKBONES, MODES, Row, StepBench

STEPS, TOP = 3, 30


def table(found, steps: int, cuda: bool) -> list[dict]:
    """The operations with the most own time, in milliseconds per step and share of all."""
    own = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = [event for event in found.key_averages() if getattr(event, own) > 0]
    if cuda:  # an operator and its kernel both have the time: count kernels only
        events = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    total = sum(getattr(event, own) for event in events)
    return [
        {
            "operation": event.key[:120],
            "ms_a_step": getattr(event, own) / 1e3 / steps,
            "share": getattr(event, own) / total,
            "calls_a_step": event.count / steps,
        }
        for event in sorted(events, key=lambda event: getattr(event, own), reverse=True)[:TOP]
    ]


def main(arguments: list[str] | None = None) -> list[dict]:
    """Profile, print, write."""
    parser = record.parser("profile", __doc__, "a tiny model")
    parser.add_argument("backbone", nargs="?", choices=BACKBONES, default=next(iter(BACKBONES)))
    parser.add_argument("--mode", choices=MODES, default="zero", help="implementation")
    options = parser.parse_args(arguments)
    if not (options.tiny or torch.cuda.is_available()):
        sys.exit("benchmarks.profile needs a GPU; --tiny shows on a CPU that it runs")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name, compiled, steps = ("tiny", "eager", 1) if options.tiny else (options.backbone, "compiled", STEPS)
    row = Row(name, options.mode, compiled=compiled)
    bench, cuda = StepBench(row, row.default_batch, device), device.type == "cuda"
    for _ in range(steps):
        bench.step()
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as found:
        for _ in range(steps):
            bench.step()
        if cuda:
            torch.cuda.synchronize()
    rows = table(found, steps, cuda)
    line = "{ms_a_step:9.3f} ms {share:6.1%} {calls_a_step:7.1f}x  {operation}"
    for entry in rows:
        print(line.format(**entry))
    if not options.tiny:
        path = record.write("profile", rows, {"step": str(row), "batch": len(bench.images)})
        found.export_chrome_trace(str(path.with_suffix(".trace.json.gz")))
    return rows


if __name__ == "__main__":
    main()
