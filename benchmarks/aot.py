"""Every Triton kernel compiled ahead of time: ``python -m benchmarks.aot [--arch 80 90 100]``, no GPU needed.

The launchers run as they do in training, on CPU tensors, with Triton's driver replaced by one that only names an
architecture; what would be launched is compiled to a cubin instead. Prints registers, shared memory and spills
of each kernel and writes `benchmarks/results/aot.json`. Registers that spill and matrix instructions that the
assembler serializes are errors.

``--cache DIR`` fills DIR with what a GPU of that architecture (default sm_90) compiles at batches of 16 and its
multiples. The GPU's machine finds it with TRITON_CACHE_DIR set to the same absolute path, the same version of
Triton and the same sources; `kernels/common.py` keeps Triton's own assembler on both.
"""

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # before a kernel is imported

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from benchmarks import record
from benchmarks.cases import CASES, DEGENERATE_CASES

ARCHITECTURES = (80, 90, 100)
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_CACHED_BATCH = 16
"""Triton compiles integers that 16 divides apart from others, and so finds one kernel for all its multiples."""


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


def read_log(text: str) -> dict:
    """Registers, spilled bytes, and whether matrix instructions wait for each other, from the assembler's words."""
    return {
        "registers": int(re.search(r"Used (\d+) registers", text).group(1)),
        "spilled_bytes": sum(int(count) for count in re.findall(r"(\d+) bytes spill", text)),
        # Each cause has a code of its own (C7510 to C7515); the words are the same.
        "serialized": "wgmma.mma_async instructions are serialized" in text,
    }


def assembled(ptx: str) -> dict:
    """What Triton's own assembler says about PTX; Triton keeps no log of it."""
    target = re.search(r"\.target (sm_(\d+)\w*)", ptx)
    assembler = _TOOLS / ("ptxas-blackwell" if int(target.group(2)) >= 100 else "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.ptx").write_text(ptx)
        command = [
            assembler,
            "-v",
            "-lineinfo",
            f"-arch={target.group(1)}",
            "kernel.ptx",
            "-o",
            "kernel.cubin",
        ]
        return read_log(
            subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stderr
        )


def faults(rows: list[dict]) -> list[str]:
    """What is wrong with which kernel; empty if nothing is."""
    found = []
    for row in rows:
        where = f"{row['kernel']} on sm_{row['arch']} ({row['case']})"
        if row["spilled_bytes"]:
            found.append(f"{where} spills {row['spilled_bytes']} bytes")
        if row["serialized"]:
            found.append(f"{where} has serialized matrix instructions")
    return found


@contextmanager
def compiling(arch: int) -> Iterator[list]:
    """Kernels that are launched inside are compiled for an architecture instead, and listed with their names."""
    triton.runtime.driver.set_active(_Driver(arch))
    launched, original = [], JITFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        launched.append((self.fn.__module__.rpartition(".")[2] + "." + self.fn.__name__, kernel))
        return kernel

    JITFunction.run = run
    try:
        yield launched
    finally:
        JITFunction.run = original


def compile_all(arch: int, names: list[str] | None = None, batch: int = 2) -> list[dict]:
    """Compile what the cases launch for one architecture; a row a kernel variant."""
    torch.set_num_threads(1)
    rows, seen = [], set()
    with compiling(arch) as launched:
        for case in [*CASES, *DEGENERATE_CASES]:
            if names and case.name not in names:
                continue
            launched.clear()
            case.build("cpu", min(batch, case.batch)).run()
            for name, kernel in launched:
                if kernel.hash in seen:
                    continue
                seen.add(kernel.hash)
                row = {"arch": arch, "case": case.label, "kernel": name, **assembled(kernel.asm["ptx"])}
                row |= {"shared_bytes": kernel.metadata.shared, "warps": kernel.metadata.num_warps}
                rows.append(row)
                print(
                    f"sm_{arch:<4}{row['kernel']:46} {case.label:44} {row['registers']:4} registers "
                    f"{row['shared_bytes']:7} bytes shared {row['spilled_bytes']:5} spilled"
                    f"{' serialized' if row['serialized'] else ''}",
                    flush=True,
                )
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Compile, print, write; 1 if something is wrong with a kernel."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", type=int, help="default 80 90 100, with --cache 90")
    parser.add_argument("--ops", nargs="+", help="only these operations; nothing is written")
    parser.add_argument("--no-write", action="store_true", help="leave the file of results alone")
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="a cache for a machine with a GPU; see above"
    )
    options = parser.parse_args(arguments)
    if options.cache:
        os.environ["TRITON_CACHE_DIR"] = str(options.cache.resolve())  # the cache names its files absolutely
    archs = options.arch or ([90] if options.cache else ARCHITECTURES)
    processes = min(len(archs), os.cpu_count() or 1)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        batches = [_CACHED_BATCH if options.cache else 2] * len(archs)
        done = pool.map(compile_all, archs, [options.ops] * len(archs), batches)
        rows = [row for rows in done for row in rows]
    if not (options.ops or options.no_write or options.cache):
        record.write("aot", rows)
    found = faults(rows)
    if found:
        print(f"{len(found)} faults in {len(rows)} kernels: {', '.join(found)}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
