"""A rank that hangs ends with exit code 70 and one line that says where: real processes, also under torchrun."""

import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch.distributed import DistBackendError

from fastalign.training.command import RANK_FAILED, run_command
from fastalign.training.distributed import collective_timeout, connection_lost
from fastalign.utils.errors import SharedError, UserError

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, sys, threading, time
import torch
from fastalign.training import distributed
from fastalign.training.command import HangTimer, run_command

def body():
    torch.set_num_threads(1)
    world = distributed.start(distributed.collective_timeout(1))
    model = torch.nn.Linear(3, 3)
    if world.size > 1:
        model = torch.nn.parallel.DistributedDataParallel(model)
    model(torch.ones(2, 3)).sum().backward()  # a first pass is slow
    with HangTimer(world, 1.0) as timer:
        for step in range(8):
            timer.beat(step, "computing")
            loss = model(torch.ones(2, 3)).sum()
            if step == 5 and world.rank == world.size - 1:
                ACTION
            loss.backward()
            world.sum(torch.ones(1))

sys.exit(run_command(body))
"""
SLEEP = "time.sleep(99)"
SILENT = "timer._paused = 1; time.sleep(99)  # as a stopped process, or a machine that is gone"
SUSPENDED = "os.system(f'(sleep 2.5; kill -CONT {os.getpid()}) & kill -STOP {os.getpid()}')"
SLOW = "[(timer.beat(step, 'reading'), time.sleep(0.5)) for _ in range(4)]"
PAUSED = "with timer.paused(): time.sleep(2)"


def run(tmp_path: Path, action: str, ranks: int = 1) -> tuple[int, str]:
    """Run a program of eight steps whose last rank does `action` in step 5. Returns exit code and stderr."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.replace("ACTION", action))
    command = [sys.executable, str(program)]
    if ranks > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90, check=False)
    return result.returncode, result.stderr


def lines_in(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("fastalign: ")]


def test_a_hang_ends_with_70_one_line_and_the_stack(tmp_path):
    code, text = run(tmp_path, SLEEP)
    assert code == RANK_FAILED == 70, text
    (line,) = lines_in(text)
    assert re.match(r"fastalign: rank 0 \(.*, pid \d+\) hangs at step 5: computing for \d s; ", line), line
    assert "faults.timeout=1 s; run the same command again to resume from the newest checkpoint" in line
    assert re.search(r'program.py", line \d+ in body', text)


def test_progress_and_suspended_time_are_no_hang(tmp_path):
    actions = [SUSPENDED, "timer.beat(step, 'computing')", SLOW, PAUSED]
    assert run(tmp_path, f"\n{' ' * 16}".join(actions)) == (0, "")


def test_a_rank_that_waits_for_a_silent_one_ends_under_torchrun(tmp_path):
    code, text = run(tmp_path, SILENT, ranks=2)
    assert code == 1, "torchrun's own"
    first, *others = lines_in(text)
    expected = "rank 0 (.*) hangs at step 5: computing, waiting for the device or the other ranks for "
    assert re.search(expected, first), text
    assert all("lost the connection" in line for line in others), text
    assert re.search(rf"Root Cause[^$]*exitcode *: {RANK_FAILED} ", text), text


GLOO = "[/x/third_party/gloo/gloo/transport/tcp/pair.cc:547] "
NCCL = "NCCL error in: /x.cpp:94, NCCL version 2.27, "


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError(f"{GLOO}Connection closed by peer [127.0.0.1]:7058"), True),
        (RuntimeError(f"{GLOO}Timed out waiting 1800000ms for recv operation"), True),
        (DistBackendError(f"{NCCL}remote process exited, ncclRemoteError"), True),
        (DistBackendError(f"{NCCL}ncclInvalidUsage"), False),
        (RuntimeError("[enforce fail at .../gloo/transport/tcp/pair.cc:456] 8000 vs 4000"), False),
        (RuntimeError("Connection closed by peer"), False),  # not from torch.distributed
        (ConnectionResetError("Connection reset by peer"), False),
    ],
)
def test_lost_connections(error, lost):
    assert connection_lost(error) == lost


def test_collectives_wait_for_longer_than_the_timer():
    for seconds in (2, 3600, 1e8):
        assert collective_timeout(seconds).total_seconds() > 1.5 * seconds
    assert collective_timeout(1e300)


@pytest.mark.parametrize(
    ("error", "backend", "how"),
    [
        (None, "nccl", "destroy"),
        (SharedError("on every rank"), "nccl", "destroy"),
        (UserError("on one rank"), "nccl", "abort"),
        (torch.OutOfMemoryError("on one rank"), "nccl", "abort"),
        (KeyboardInterrupt(), "nccl", "abort"),
        (UserError("on one rank"), "gloo", "destroy"),
    ],
)
def test_a_rank_that_fails_alone_does_not_wait_for_the_others(error, backend, how, monkeypatch):
    """NCCL's `destroy_process_group` returns when every rank has called it."""
    called, group = [], torch.distributed
    monkeypatch.setattr(group, "is_initialized", lambda: True)
    monkeypatch.setattr(group, "get_backend", lambda: backend)
    monkeypatch.setattr(group, "destroy_process_group", lambda: called.append("destroy"))
    monkeypatch.setattr(group.distributed_c10d, "_abort_process_group", lambda: called.append("abort"))

    def body():
        if error:
            raise error

    with suppress(torch.OutOfMemoryError):
        run_command(body)
    assert called == [how]
