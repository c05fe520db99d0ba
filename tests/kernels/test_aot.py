"""`benchmarks.aot` finds spills and serialized matrix instructions, and fills a cache that other batches hit."""

import os
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from benchmarks import aot
from benchmarks.record import ROOT

SPILLING = "\n".join(
    [
        ".version 8.0\n.target sm_90a\n.address_size 64",
        ".visible .entry kernel(.param .u64 p) .maxnreg 32 {\n.reg .b64 %p;\n.reg .b32 %r<64>;",
        "ld.param.u64 %p, [p];",
        *(f"ld.volatile.global.u32 %r{i}, [%p+{4 * i}];" for i in range(64)),
        *(f"st.volatile.global.u32 [%p+{4 * i}], %r{63 - i};" for i in range(64)),
        "ret;\n}\n",
    ]
)
"""64 live values in at most 32 registers."""
SERIAL = """ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due \
to non wgmma instructions defining accumulator registers of a wgmma between start and end of the pipeline stage \
in the function 'dkdv_kernel'
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'dkdv_kernel' for 'sm_90a'
ptxas info    : Function properties for dkdv_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 230 registers, used 1 barriers
"""
"""As CUDA 12.8's assembler writes it."""
CLEAN = SERIAL.partition("\n")[2]


def test_the_assemblers_faults_are_errors(monkeypatch, capsys):
    rows = [aot.assembled(SPILLING), *map(aot.read_log, (SERIAL, CLEAN))]
    rows = [
        {"kernel": f"k{i}", "arch": 90, "case": "c", "shared_bytes": 0, **row} for i, row in enumerate(rows)
    ]
    assert rows[0]["registers"] == 32
    large = {**rows[2], "arch": 80, "shared_bytes": 200_000}  # sm_90 has it
    assert aot.faults([large, {**large, "arch": 90}]) == [
        "k2 on sm_80 (c) needs 200000 bytes of shared memory"
    ]
    spill, serial = aot.faults(rows)
    assert spill == f"k0 on sm_90 (c) spills {rows[0]['spilled_bytes']} bytes"
    assert serial == "k1 on sm_90 (c) has serialized matrix instructions"
    monkeypatch.setattr(aot, "compile_all", lambda *arguments: [rows[1]])
    monkeypatch.setattr(aot, "ProcessPoolExecutor", lambda *_: nullcontext(SimpleNamespace(map=map)))
    assert aot.main(["--no-write"]) == 1
    assert "3 faults in 3 kernels: k1 on sm_90 (c) has serialized" in capsys.readouterr().err


LAUNCH = """
import torch
from benchmarks import aot
from fastalign.kernels.unpack import unpack

slots, ends = torch.full((48, 3, 197), -1, dtype=torch.int32), torch.zeros(145, dtype=torch.int32)
packed = torch.zeros(48 * 395, 768, dtype=torch.bfloat16, requires_grad=True)
with aot.compiling(90) as launched:
    unpack(packed, (None, slots, ends, None)).sum().backward()
assert len(launched) == 2
"""


@pytest.mark.slow
def test_a_run_with_another_batch_finds_its_kernels_in_the_cache(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    environment.pop("TRITON_INTERPRET", None)

    def run(*command):
        subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=True, capture_output=True)
        return {path for path in (tmp_path / "cache").rglob("*") if path.is_file()}

    made = run("-m", "benchmarks.aot", "--cache", str(tmp_path / "cache"), "--ops", "unpack")
    assert any(path.suffix == ".cubin" for path in made)
    assert run("-c", LAUNCH) == made
