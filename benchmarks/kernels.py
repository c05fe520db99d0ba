"""Speed of every kernel at the shapes of training: ``python -m benchmarks.kernels [--ops NAME ...] [--cases LABEL]``.

Compares each kernel with eager PyTorch and torch.compile, as `benchmarks.compare` describes. `benchmarks.attention`
compares attention with other implementations.
"""

import os
import sys
from collections.abc import Callable

if "--tiny" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is imported

import torch

from benchmarks import compare
from benchmarks.cases import CASES, TINY_CASES, Case


def implementations(case: Case, inputs: dict, tiny: bool) -> tuple[dict[str, Callable], set[str]]:
    """The kernel, its reference, and the compiled reference."""
    functions = {"ours": case.kernel, "eager": case.reference}
    if case.compiles:
        options = {"backend": "aot_eager"} if tiny else {}
        functions["compile"] = torch.compile(case.reference, fullgraph=True, dynamic=False, **options)
    return functions, set()


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; the exit code."""
    return compare.main("kernels", __doc__, CASES, TINY_CASES, implementations, arguments)[0]


if __name__ == "__main__":
    sys.exit(main())
