"""A rank that stops is named within the set time: real processes that hang, are stopped, or die."""

import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch

from fastalign.training import distributed
from fastalign.training.command import run_command
from fastalign.training.distributed import connection_lost
from fastalign.training.standing import (
    WAITING,
)
from fastalign.training.watchdog import BROKEN, Watchdog, patience
from tests.reliability.test_preemption import PRELOAD

TIMEOUT = 2.0
SOLO = distributed.World(0, 1, torch.device("cpu"))


def steps(watchdog, world, count, before=lambda step: None):
    """A loop with the stations of training: each rank's own work, and a sum over all of them."""
    for step in range(count):
        watchdog.beat(step, "waiting for data")
        time.sleep(0.02)
        watchdog.beat(step, "computing")
        before(step)
        world.sum(torch.ones(4))


def forever():
    while True:
        time.sleep(1)


def hang_with_data(watchdog, world):
    """Rank 1 hangs, later in the step than its last beat would say."""
    steps(watchdog, world, 9, lambda step: forever() if (world.rank, step) == (1, 5) else None)


def hang_alone(watchdog, world):
    watchdog.beat(41, "waiting for data")
    forever()


def come_back_too_late(watchdog, world):
    """The main thread goes on when the verdict is spoken already."""
    judged, end = threading.Event(), watchdog._end
    watchdog._end = lambda line: (judged.set(), end(line))
    watchdog.beat(41, "waiting for data")
    judged.wait()


def stop_second(watchdog, world):
    """Rank 1's process is stopped; the store is elsewhere, in rank 0."""
    steps(
        watchdog,
        world,
        60,
        lambda s: os.kill(os.getpid(), signal.SIGSTOP) if (world.rank, s) == (1, 50) else None,
    )


def stop_first(watchdog, world):
    """Rank 0's process is stopped, and the store with it."""
    steps(
        watchdog,
        world,
        60,
        lambda s: os.kill(os.getpid(), signal.SIGSTOP) if (world.rank, s) == (0, 50) else None,
    )


def die_second(watchdog, world):
    steps(
        watchdog,
        world,
        40,
        lambda s: os.kill(os.getpid(), signal.SIGKILL) if (world.rank, s) == (1, 30) else None,
    )


def die_first(watchdog, world):
    steps(
        watchdog,
        world,
        40,
        lambda s: os.kill(os.getpid(), signal.SIGKILL) if (world.rank, s) == (0, 30) else None,
    )


def err_second(watchdog, world):
    def fail(step):
        if (world.rank, step) == (1, 3):
            raise ValueError("a bug of one rank")

    steps(watchdog, world, 9, fail)


def slow_but_alive(watchdog, world):
    """Longer than the timeout in all, never between two beats; a pause of one rank is longer, and said to be."""
    steps(watchdog, world, 4, lambda step: time.sleep(0.7))
    if world.main:
        with watchdog.paused():
            time.sleep(1.6 * TIMEOUT)
    world.sum(torch.ones(4))
    for step in range(4, 12):  # rank 0 works alone, with beats, and rank 1 waits for it all the time
        watchdog.beat(4, f"validating {step}")
        time.sleep(0.4 if world.main else 0)
    watchdog.beat(4, WAITING)
    world.sum(torch.ones(4))


def backward_hangs(watchdog, world):
    """Rank 0 waits within DDP's backward pass, for rank 1 that has beaten as often."""
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 3))
    for step in range(4):
        watchdog.beat(step, "computing")
        loss = model(torch.ones(2, 3)).sum()
        if (world.rank, step) == (1, 3):
            forever()
        loss.backward()


def whole_machine_stalls(watchdog, world):
    """All ranks stand still for longer than the timeout, by no fault of theirs; awake, each takes less."""
    ranks = world.gather(os.getpid())
    watchdog.beat(0, "computing")
    if world.main:
        names = " ".join(map(str, ranks))
        stall = f"sleep 0.4; kill -STOP {names}; sleep 3; kill -CONT {names}"
        subprocess.Popen(["sh", "-c", stall], stderr=subprocess.DEVNULL)
    time.sleep(1)  # which ends in the stall
    time.sleep(0.4)
    steps(watchdog, world, 20)


# Scene, ranks, exit codes, what the line says. SIGSTOP'd processes get no code: None.
SCENES = {
    hang_with_data: (
        [BROKEN, BROKEN],
        r"rank 1 \(.*, pid {1}\) stopped responding at step 5: computing for \d+ s, at "
        r"reliability/test_watchdog.py:\d+, forever",
    ),
    hang_alone: (
        [BROKEN],
        r"rank 0 \(.*, pid {0}\) stopped responding at step 41: waiting for data for \d+ s.* "
        r"goes on from the checkpoint of step 40",
    ),
    come_back_too_late: ([BROKEN], r"rank 0 \(.*, pid {0}\) stopped responding at step 41"),
    stop_second: (
        [BROKEN, None],
        r"rank 1 \(.*, pid {1}\) has not answered for \d+ s: .*last seen at step [1-5]\d, ",
    ),
    stop_first: (
        [None, BROKEN],
        r"rank 0 has not answered for \d+ s \(it keeps the ranks' store.*"
        r"rank 1 \(.*, pid {1}\) waits at step 50, computing, at ranks/distributed.py:\d+, sum",
    ),
    die_second: (
        [BROKEN, -signal.SIGKILL],
        r"rank 0, at step 30, computing: lost rank 1 \(.*, pid {1}\), last seen "
        r"at step \d+, .*; the same command goes on",
    ),
    die_first: (
        [-signal.SIGKILL, BROKEN],
        r"rank 1, at step 30, computing: lost rank 0 \(.*, pid {0}\), last seen "
        r"at step \d+, .*; the same command goes on",
    ),
    err_second: (
        [BROKEN, 1],
        r"rank 0, at step 3, computing: lost rank 1 \(.*, pid {1}\), which ended with "
        r"ValueError: a bug of one rank; the same command goes on",
    ),
    slow_but_alive: ([0, 0], None),
    whole_machine_stalls: ([0, 0], None),
    backward_hangs: (
        [BROKEN, BROKEN],
        r"rank 1 \(.*, pid {1}\) stopped responding at step 3: computing for \d+ s, at "
        r"reliability/test_watchdog.py:\d+, forever",
    ),
}


def play(scene, rank, size, port, stderr):
    """A rank of its own: the command's way around the watchdog's."""
    torch.set_num_threads(1)
    file = os.open(stderr, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}

    def body():
        world = distributed.start(patience(TIMEOUT))
        with Watchdog(world, TIMEOUT, saved=lambda: 40) as watchdog:
            scene(watchdog, world)
        left = [thread.name for thread in threading.enumerate() if "watchdog" in thread.name]
        assert not left, left

    sys.exit(run_command(body))


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """All scenes at once, since they mostly sleep: exit codes, seconds, standard error and process ids of each."""
    context, folder = multiprocessing.get_context("forkserver"), tmp_path_factory.mktemp("scenes")
    context.set_forkserver_preload(PRELOAD)
    processes = {}
    for scene, (codes, _) in SCENES.items():
        with socket.create_server(("localhost", 0)) as server:
            port = server.getsockname()[1]
        shared = (len(codes), port, str(folder / scene.__name__))
        processes[scene] = [context.Process(target=play, args=(scene, r, *shared)) for r in range(len(codes))]
        for process in processes[scene]:
            process.start()
    begin, ends = time.monotonic(), {}
    expected = {
        scene: [p for p, code in zip(ps, SCENES[scene][0], strict=True) if code is not None]
        for scene, ps in processes.items()
    }
    while len(ends) < len(SCENES) and time.monotonic() < begin + 40:
        for scene in SCENES.keys() - ends.keys():
            if not any(process.is_alive() for process in expected[scene]):
                ends[scene] = time.monotonic() - begin
        time.sleep(0.05)
    found = {}
    for scene, group in processes.items():
        codes = [process.exitcode for process in group]
        for process in group:
            process.kill()
            process.join()
        path = folder / scene.__name__
        found[scene] = (
            codes,
            ends.get(scene),
            path.read_text() if path.exists() else "",
            [p.pid for p in group],
        )
    return found


def told(text):
    return [line for line in text.splitlines() if line.startswith("fastalign: ")]


def test_a_machine_says_it_once(played):
    """But for one scene at most: a rank that cannot ask in time who speaks, on a machine that stalls, says it too."""
    counts = {scene.__name__: len(told(played[scene][2])) for scene in SCENES}
    assert sum(count > 1 for count in counts.values()) <= 1, counts


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_scene(played, scene):
    """Exit codes, a line that is right, and not much later than the timeout."""
    codes, pattern = SCENES[scene]
    found, seconds, text, pids = played[scene]
    assert found == codes, text
    if pattern is None:
        assert text == ""
        return
    assert len(set(told(text))) == 1, text
    line = told(text)[0]
    assert re.search(pattern.format(*pids), line), line
    assert seconds < TIMEOUT + 18  # of a machine that begins twenty processes at once, and may stall


def test_a_normal_end_leaves_no_thread():
    before = set(threading.enumerate())
    with Watchdog(SOLO, 0.6) as watchdog:
        assert len(set(threading.enumerate()) - before) == 1
        with watchdog.paused():
            time.sleep(1.2)
        for step in range(8):
            watchdog.beat(step, "computing")
            time.sleep(0.15)
    assert set(threading.enumerate()) == before
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), Watchdog(SOLO, 600):
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert set(threading.enumerate()) == before


def test_a_beat_costs_next_to_nothing():
    watchdog, begin = Watchdog(SOLO, 600), time.perf_counter()
    for step in range(100_000):
        watchdog.beat(step, "computing")
    assert time.perf_counter() - begin < 1  # ten microseconds each, and much less on an idle machine


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


def test_patience_is_longer_than_the_watchdog():
    assert patience(2).total_seconds() == 1800
    assert patience(3600).total_seconds() == 7260
    assert patience(1e300).total_seconds() > 1e8
