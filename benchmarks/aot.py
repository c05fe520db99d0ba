"""Every Triton kernel compiled ahead of time: ``python -m benchmarks.aot [--arch 80 90 100]``, no GPU needed.

The launchers run as they do in training, on CPU tensors, with Triton's driver replaced by one that only names an
architecture; what would be launched is compiled to a cubin instead. Prints registers, shared memory and spills
of each kernel and writes `benchmarks/results/aot.json`; a spill at a default tile is an error.
"""

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from benchmarks import record
from benchmarks.cases import CASES, DEGENERATE_CASES

ARCHITECTURES = (80, 90, 100)
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class _Driver:
    """What Triton asks its driver before it compiles."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


def _resources(kernel, arch: int) -> dict:
    """Registers and spilled bytes, from the assembler's own words; Triton keeps no log of them."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.ptx").write_text(kernel.asm["ptx"])
        assembler = _TOOLS / ("ptxas-blackwell" if arch >= 100 else "ptxas")
        target = re.search(r"\.target (sm_\w+)", kernel.asm["ptx"]).group(1)
        command = [assembler, "-v", f"-arch={target}", "kernel.ptx", "-o", "kernel.cubin"]
        text = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stderr
    spilled = sum(int(count) for count in re.findall(r"(\d+) bytes spill", text))
    return {"registers": int(re.search(r"Used (\d+) registers", text).group(1)), "spilled_bytes": spilled}


def compile_all(arch: int, names: list[str] | None = None) -> list[dict]:
    """Compile what the cases launch for one architecture; a row a kernel variant."""
    torch.set_num_threads(1)
    triton.runtime.driver.set_active(_Driver(arch))
    launched, original = [], JITFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        launched.append((self.fn.__module__.rpartition(".")[2] + "." + self.fn.__name__, kernel))
        return kernel

    rows, seen = [], set()
    JITFunction.run = run
    try:
        for case in [*CASES, *DEGENERATE_CASES]:
            if names and case.name not in names:
                continue
            launched.clear()
            case.build("cpu", min(2, case.batch)).run()
            for name, kernel in launched:
                if kernel.hash in seen:
                    continue
                seen.add(kernel.hash)
                row = {"arch": arch, "case": case.label, "kernel": name, **_resources(kernel, arch)}
                row |= {"shared_bytes": kernel.metadata.shared, "warps": kernel.metadata.num_warps}
                rows.append(row)
                print(
                    f"sm_{arch:<4}{row['kernel']:46} {case.label:44} {row['registers']:4} registers "
                    f"{row['shared_bytes']:7} bytes shared {row['spilled_bytes']:5} spilled",
                    flush=True,
                )
    finally:
        JITFunction.run = original
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Compile, print, write; 1 if something spills."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", type=int, default=list(ARCHITECTURES), help="80 90 100")
    parser.add_argument("--ops", nargs="+", help="only these operations; nothing is written")
    parser.add_argument("--no-write", action="store_true", help="leave the file of results alone")
    options = parser.parse_args(arguments)
    processes = min(len(options.arch), os.cpu_count() or 1)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        done = pool.map(compile_all, options.arch, [options.ops] * len(options.arch))
        rows = [row for rows in done for row in rows]
    if not (options.ops or options.no_write):
        record.write("aot", rows)
    spills = [f"{row['kernel']} on sm_{row['arch']} ({row['case']})" for row in rows if row["spilled_bytes"]]
    if spills:
        print(f"{len(spills)} of {len(rows)} kernels spill: {', '.join(spills)}", file=sys.stderr)
    return 1 if spills else 0


if __name__ == "__main__":
    sys.exit(main())
