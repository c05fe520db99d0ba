"""A rank that hangs ends with 70 and one line that says where: real processes, also two ranks under torchrun."""

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from fastalign.training.distributed import World, connection_lost
from fastalign.training.hang import RANK_FAILED, HangTimer, collective_timeout

ROOT = Path(__file__).parents[2]
SOLO = World(0, 1, torch.device("cpu"))
PROGRAM = """
import os, sys, threading, time
import torch
from fastalign.training import distributed
from fastalign.training.command import run_command
from fastalign.training.hang import HangTimer, collective_timeout

def body():
    torch.set_num_threads(1)
    world = distributed.start(collective_timeout(1))
    model = torch.nn.Linear(3, 3)
    if world.size > 1:
        model = torch.nn.parallel.DistributedDataParallel(model)
    timer = HangTimer(world, 1.0, saved=lambda: 4)
    last = world.rank == world.size - 1
    with timer:
        for step in range(8):
            timer.beat(step, "computing")
            loss = model(torch.ones(2, 3)).sum()
            if step == 5 and last:
                {}
            loss.backward()
            world.sum(torch.ones(1))

sys.exit(run_command(body))
"""
SLEEP, LOCK = (
    "time.sleep(99)",
    "threading.Lock().acquire(); lock = threading.Lock(); lock.acquire(); lock.acquire()",
)
SILENT = "timer._paused = 1; time.sleep(99)"  # as a stopped process, or a machine that is gone
SUSPENDED = "os.system(f'(sleep 2.5; kill -CONT {os.getpid()}) & kill -STOP {os.getpid()}')"
SLOW = "\n".join(
    [
        "for _ in range(4): timer.beat(step, 'computing'); time.sleep(0.5)",
        "                with timer.paused(): time.sleep(2)",
    ]
)


def start(tmp_path, action, ranks=1):
    """A program of eight steps, whose last rank does something at step 5. Returns its exit code and output."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.replace("{}", action))
    command = [sys.executable, str(program)]
    if ranks > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90, check=False)
    return result.returncode, result.stderr


def lines_in(text):
    return [line for line in text.splitlines() if line.startswith("fastalign: ")]


@pytest.mark.parametrize("action", [SLEEP, LOCK], ids=["sleep", "lock"])
def test_a_hang_ends_with_70_and_one_line(tmp_path, action):
    code, text = start(tmp_path, action)
    assert code == RANK_FAILED, text
    (line,) = lines_in(text)
    assert re.match(
        r"fastalign: rank 0 \(.*, pid \d+\) hangs at step 5: computing for \d s; the run ends after "
        r"faults.timeout=1 s; the same command goes on from the checkpoint of step 4",
        line,
    ), line
    assert re.search(r'program.py", line \d+ in body', text), "the stack of the main thread"


@pytest.mark.parametrize("action", [SUSPENDED, SLOW], ids=["suspended", "slow"])
def test_time_asleep_and_progress_are_no_hang(tmp_path, action):
    assert start(tmp_path, action) == (0, "")


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        (SLEEP, r"rank 1 \(.*\) hangs at step 5: computing for "),
        (SILENT, r"rank 0 \(.*\) hangs at step 5: computing, waiting for the device or the other ranks for "),
    ],
    ids=["sleep", "silent"],
)
def test_no_rank_waits_for_ever_and_the_one_that_hangs_reports_first(tmp_path, action, expected):
    code, text = start(tmp_path, action, ranks=2)
    assert code == 1, "torchrun's own"
    first = lines_in(text)[0]
    assert re.search(expected, first), text
    assert all("lost the connection" in line for line in lines_in(text)[1:]), text
    assert re.search(rf"Root Cause[^$]*exitcode *: {RANK_FAILED} ", text), text


def test_a_normal_end_leaves_no_thread():
    before = set(threading.enumerate())
    with HangTimer(SOLO, 600):
        assert len(set(threading.enumerate()) - before) == 1
    assert set(threading.enumerate()) == before


def test_only_lost_connections_are_taken_for_some():
    gloo = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:7058"
    assert connection_lost(RuntimeError(gloo))
    assert connection_lost(
        RuntimeError(gloo.replace("Connection closed by peer", "Timed out waiting 1800000ms"))
    )
    nccl = "NCCL error in: /pytorch/x.cpp:94, {}, NCCL version 2.27"
    assert connection_lost(
        torch.distributed.DistBackendError(nccl.format("remote process exited, ncclRemoteError"))
    )
    assert not connection_lost(torch.distributed.DistBackendError(nccl.format("ncclInvalidUsage")))
    assert not connection_lost(
        RuntimeError("[enforce fail at .../gloo/transport/tcp/pair.cc:456] 8000 vs 4000")
    )
    assert not connection_lost(RuntimeError("Connection closed by peer"))  # not of torch's ranks
    assert not connection_lost(ConnectionResetError("Connection reset by peer"))


def test_collectives_wait_for_longer_than_the_timer():
    assert [collective_timeout(seconds).total_seconds() for seconds in (2, 3600)] == [1800, 7260]
    assert collective_timeout(1e300).total_seconds() > 1e8
