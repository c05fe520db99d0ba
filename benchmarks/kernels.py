"""Speed of every kernel at the shapes of training: ``python -m benchmarks.kernels [--ops NAME ...] [--resume]``.

First the GPU's own copy bandwidth and matmul rate, then the cases of `benchmarks.cases`: the kernel, eager PyTorch
and torch.compile of it, by `benchmarks.compare`, which has the rules and the options. Attention against other
implementations is `benchmarks.attention`.
"""

import os
import sys
from collections.abc import Callable

if "--tiny" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is imported

import torch

from benchmarks import compare
from benchmarks.cases import CASES, TINY_CASES, Built, Case
from benchmarks.targets import targets

SOURCES = (
    "kernels/*.py",
    "fastalign/reference.py",
    *(f"benchmarks/{name}.py" for name in ("cases", "compare", "kernels", "measure")),
)
"""What its figures depend on: a change of a model does not make them stale."""


def implementations(case: Case, built: Built, tiny: bool) -> tuple[dict[str, Callable], dict[str, str], set]:
    """The kernel, its reference, and torch.compile of that: see `compare.Benchmark`."""
    functions = {"ours": case.kernel, "eager": case.reference}
    if case.compiles:
        options = {"backend": "aot_eager"} if tiny else {}
        functions["compile"] = torch.compile(case.reference, fullgraph=True, dynamic=False, **options)
    return functions, {}, set()


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; the exit code."""
    benchmark = compare.Benchmark("kernels", CASES, TINY_CASES, implementations, targets, SOURCES)
    return compare.run(benchmark, __doc__, arguments)[0]


if __name__ == "__main__":
    sys.exit(main())
