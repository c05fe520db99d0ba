"""Profile of a training step: ``python -m benchmarks.profile [BACKBONE] [--mode drop] [--tiny]``.

Runs the compiled step of `benchmarks.step` under torch's profiler after warm-up. Prints the costliest operations and
writes a trace for Perfetto to `benchmarks/results/profile.trace.json.gz` (not committed). With ``--tiny`` the step is
eager, and nothing is written.
"""

import sys

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import record
from benchmarks.step_bench import BACKBONES, MODES, Row, StepBench

STEPS, TOP = 3, 30


def main(arguments: list[str] | None = None) -> None:
    """Profile, print, write."""
    parser = record.parser("profile", __doc__, "a tiny model")
    parser.add_argument("backbone", nargs="?", choices=BACKBONES, default=next(iter(BACKBONES)))
    parser.add_argument("--mode", choices=MODES, default="zero", help="implementation")
    options = parser.parse_args(arguments)
    cuda = torch.cuda.is_available()
    if not (options.tiny or cuda):
        sys.exit("benchmarks.profile needs a GPU; --tiny shows on a CPU that it runs")
    name, compiled, steps = ("tiny", "eager", 1) if options.tiny else (options.backbone, "compiled", STEPS)
    row = Row(name, options.mode, compiled=compiled)
    bench = StepBench(row, row.default_batch, torch.device("cuda" if cuda else "cpu"))
    for _ in range(steps):
        bench.step()
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as found:
        for _ in range(steps):
            bench.step()
        if cuda:
            torch.cuda.synchronize()
    print(f"{row}, batch {len(bench.images)}: {steps} steps")
    own = f"self_{'cuda' if cuda else 'cpu'}_time_total"
    print(found.key_averages().table(sort_by=own, row_limit=TOP, max_name_column_width=90))
    if not options.tiny:
        found.export_chrome_trace(str(record.RESULTS / "profile.trace.json.gz"))


if __name__ == "__main__":
    main()
