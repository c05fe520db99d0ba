"""Compile every Triton kernel ahead of time: ``python -m benchmarks.aot [--arch 80 90 100]``, no GPU needed.

The launchers run on CPU tensors with a driver that only names an architecture; kernels are compiled instead of
launched. Prints registers, shared memory and spills of each kernel and writes `aot.json`. Spilled registers, matrix
instructions that the assembler serializes, and more shared memory than a block may have are errors.

``--cache DIR`` fills DIR with what a GPU of that architecture (default sm_90) compiles for batches divisible by 16.
The GPU's machine uses it with TRITON_CACHE_DIR set to the same absolute path, the same Triton wheel, which differs by
version of Python, and the same sources.
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
SHARED_BYTES = {80: 166_912, 90: 232_448, 100: 232_448}
"""The most that a block may have; a launch with more fails."""
_CACHED_BATCH = 16
"""Triton specializes on divisibility by 16, so one kernel serves all multiples."""


class _Driver:
    """The driver functions that Triton calls before it compiles."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton caches kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


def read_log(text: str) -> dict:
    """Registers, spilled bytes, and whether matrix instructions are serialized, from the assembler's log."""
    return {
        "registers": int(re.search(r"Used (\d+) registers", text).group(1)),
        "spilled_bytes": sum(int(count) for count in re.findall(r"(\d+) bytes spill", text)),
        # The causes have codes C7510 to C7515 and the same text.
        "serialized": "wgmma.mma_async instructions are serialized" in text,
    }


def assembled(ptx: str) -> dict:
    """The log of Triton's own assembler for PTX; Triton does not keep it."""
    target = re.search(r"\.target (sm_(\d+)\w*)", ptx)
    assembler = _TOOLS / ("ptxas-blackwell" if int(target.group(2)) >= 100 else "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.ptx").write_text(ptx)
        options = ["-v", "-lineinfo", f"-arch={target.group(1)}", "kernel.ptx", "-o", "kernel.cubin"]
        done = subprocess.run([assembler, *options], cwd=folder, capture_output=True, text=True, check=True)
        return read_log(done.stderr)


def faults(rows: list[dict]) -> list[str]:
    """A message for each spill and each serialized kernel."""
    found = []
    for row in rows:
        where = f"{row['kernel']} on sm_{row['arch']} ({row['case']})"
        if row["spilled_bytes"]:
            found.append(f"{where} spills {row['spilled_bytes']} bytes")
        if row["serialized"]:
            found.append(f"{where} has serialized matrix instructions")
        if row["shared_bytes"] > SHARED_BYTES.get(row["arch"], max(SHARED_BYTES.values())):
            found.append(f"{where} needs {row['shared_bytes']} bytes of shared memory")
    return found


@contextmanager
def compiling(arch: int) -> Iterator[list]:
    """Compile kernels for an architecture instead of launching them; yields their names and results."""
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
    """Compile the kernels that the cases launch for one architecture; one row per variant."""
    torch.set_num_threads(1)
    rows, seen = [], set()
    with compiling(arch) as launched:
        for case in [*CASES, *DEGENERATE_CASES]:
            if names and case.name not in names:
                continue
            launched.clear()
            case.run("cpu", min(batch, case.batch))
            for name, kernel in launched:
                if kernel.hash in seen:
                    continue
                seen.add(kernel.hash)
                row = {"arch": arch, "case": case.label, "kernel": name, **assembled(kernel.asm["ptx"])}
                row |= {"shared_bytes": kernel.metadata.shared, "warps": kernel.metadata.num_warps}
                rows.append(row)
                line = (
                    "sm_{arch:<4}{kernel:46} {case:44} {registers:4} registers {shared_bytes:7} bytes shared "
                )
                line += "{spilled_bytes:5} spilled" + " serialized" * row["serialized"]
                print(line.format(**row), flush=True)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Compile, print, write; 1 if a kernel has a fault."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", type=int, help="default 80 90 100, with --cache 90")
    parser.add_argument("--ops", nargs="+", help="only these operations; nothing is written")
    parser.add_argument("--no-write", action="store_true", help="do not write the results")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="fill a cache for a machine with a GPU")
    options = parser.parse_args(arguments)
    if options.cache:
        os.environ["TRITON_CACHE_DIR"] = str(options.cache.resolve())  # the cache contains absolute paths
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
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
