"""Steps of a ViT-S on one CPU thread, in ratios: ``python -m benchmarks.step --ratios``."""

import statistics
import time

import torch

from benchmarks import record
from benchmarks.step_bench import KEY, PRECISIONS, TINY_KWARGS, Row, measure
from fastalign.backbones.precision import compute_dtype
from fastalign.training.memory import keep_freed_memory

ROWS = [
    *(Row("S/16-224", "baseline", 30.0, "eager", precision) for precision in PRECISIONS),
    *(
        Row("S/16-224", mode, 30.0, compiled, precision)
        for precision in PRECISIONS
        for compiled in ("eager", "compiled")
        for mode in ("zero", "drop")
    ),
]
"""The first is what the others are compared with."""


def ratios(tiny: bool) -> list[dict]:
    """Steps of a ViT-S on one CPU thread, compared by processor time.

    Processor time, because other programs share the machine. Freed memory is kept as in training: else whoever
    allocates in an unlucky order pays for new pages.
    """
    keep_freed_memory()
    threads, device = torch.get_num_threads(), torch.device("cpu")
    torch.set_num_threads(1)
    rows, kwargs = ROWS, TINY_KWARGS if tiny else {}
    if compute_dtype("auto", device) != torch.bfloat16:
        print("this CPU has no bf16 instructions: rows in bf16 are left out")
        rows = [row for row in rows if row.precision == "fp32"]
    if tiny:  # a CPU's compiler takes half a minute
        rows = [row for row in rows if row.compiled == "eager"]
    try:
        peak = {name: matmul_rate(dtype, 64 if tiny else 1536) for name, dtype in PRECISIONS.items()}
        found = measure(rows, 2 if tiny else 8, device, kwargs, *((1, 1) if tiny else (3, 2)))
    finally:
        torch.set_num_threads(threads)
    results, reference = [], found[0]["ms"]
    for row in found:
        result = {key: row[key] for key in (*KEY, "batch", "failed", "steps") if key in row}
        if "failed" not in row:
            result["speedup"] = reference / row["ms"]
            result["matmul_share"] = row["flops_per_second"] / peak[row["precision"]]
            name = f"{row['mode']:9}{row['compiled']:9}{row['precision']}"
            print(
                f"{name} {result['speedup']:6.2f}x  {100 * result['matmul_share']:3.0f}% of the matmul rate"
            )
        results.append(result)
    if not tiny:
        record.write("step_cpu", results, {"reference": str(rows[0]), "threads": 1})
    return results


def matmul_rate(dtype: torch.dtype, size: int) -> float:
    """FLOP/s of a square product, in processor time."""
    a, b = torch.randn(2, size, size, dtype=dtype)
    seconds = []
    for _ in range(10):
        before = time.process_time()
        a @ b
        seconds.append(time.process_time() - before)
    return 2 * size**3 / statistics.median(seconds[2:])
