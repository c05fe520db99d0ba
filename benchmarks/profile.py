"""Where the time of one training step goes: ``python -m benchmarks.profile [BACKBONE] [--mode drop] [--tiny]``.

Runs the compiled step of `benchmarks.step` under torch's profiler after warm-up; writes a trace for Perfetto to
`benchmarks/results/profile.trace.json.gz` (not for the repository) and the table of the costliest operations to
`benchmarks/results/profile.json`. On a CPU the step is eager, and nothing is written.
"""

import argparse

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import plots, record
from benchmarks.step import BACKBONES, TINY, Contestant

STEPS, TOP = 3, 30


def profiled(contestant: Contestant, warm_up: int, steps: int):
    """The profile of some steps after the warm-up."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (contestant.device.type == "cuda")
    for _ in range(warm_up):
        contestant.step()
    with profile(activities=activities) as found:
        for _ in range(steps):
            contestant.step()
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
    parser.add_argument("backbone", nargs="?", default=next(iter(BACKBONES)), help="timm's name")
    parser.add_argument("--mode", choices=["zero", "drop", "baseline"], default="zero", help="implementation")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: checks that it runs")
    parser.add_argument("--resume", action="store_true", help="nothing, where this has been measured already")
    options = parser.parse_args(arguments)
    identity = record.identity() | {"backbone": options.backbone, "mode": options.mode}
    if options.resume and (earlier := record.resume("profile", identity)):
        print("measured already")
        return earlier["rows"]
    cuda = torch.cuda.is_available() and not options.tiny
    name = next(iter(TINY)) if options.tiny else options.backbone
    batch = TINY[name] if options.tiny else BACKBONES.get(name, 64) if cuda else 2
    extra = {"img_size": 32, "depth": 2} if options.tiny else {}
    contestant = Contestant(options.mode, name, batch, 30.0, cuda, **extra)
    steps = STEPS if cuda else 1
    found = profiled(contestant, 5 if cuda else 1, steps)
    rows = table(found, steps, contestant.device.type == "cuda")
    for row in rows:
        print(
            f"{row['ms_a_step']:9.3f} ms {100 * row['share']:5.1f} % {row['calls_a_step']:7.1f}x  {row['operation']}"
        )
    if cuda:
        facts = {"identity": identity, "backbone": name, "mode": options.mode, "batch": batch}
        path = record.write("profile", rows, facts)
        found.export_chrome_trace(str(path.with_suffix(".trace.json.gz")))
        plots.draw("profile")
    return rows


if __name__ == "__main__":
    main()
