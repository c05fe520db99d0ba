"""A rank that stops is named within the set time: real processes that hang, are stopped, or die."""

import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from fastalign.engine import distributed
from fastalign.engine.command import guarded
from fastalign.engine.standing import BACKWARD, COLLECTIVE, FREE, Standing, accusation, furthest_behind, where
from fastalign.engine.watchdog import BROKEN, WAITING, Watchdog, patience

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
    watchdog.saved = 40
    watchdog.beat(41, "waiting for data")
    forever()


def stop_second(watchdog, world):
    """Rank 1's process is stopped; the store is elsewhere, in rank 0."""
    stop = (world.rank, 4)
    steps(watchdog, world, 9, lambda s: os.kill(os.getpid(), signal.SIGSTOP) if stop == (1, s) else None)


def stop_first(watchdog, world):
    """Rank 0's process is stopped, and the store with it."""
    steps(watchdog, world, 9, lambda s: os.kill(os.getpid(), signal.SIGSTOP) if (world.rank, s) == (0, 4) else None)


def die_second(watchdog, world):
    steps(watchdog, world, 40, lambda s: os.kill(os.getpid(), signal.SIGKILL) if (world.rank, s) == (1, 30) else None)


def die_first(watchdog, world):
    steps(watchdog, world, 40, lambda s: os.kill(os.getpid(), signal.SIGKILL) if (world.rank, s) == (0, 30) else None)


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


# Scene, ranks, exit codes, what the line says. SIGSTOP'd processes get no code: None.
SCENES = {
    hang_with_data: ([BROKEN, BROKEN], r"rank 1 \(.*, pid {1}\) stopped responding at step 5: computing for 2 s, at "
                     r"tests/test_watchdog.py:\d+, forever"),
    hang_alone: ([BROKEN], r"rank 0 \(.*, pid {0}\) stopped responding at step 41: waiting for data for 2 s.* "
                 r"goes on from the checkpoint of step 40"),
    stop_second: ([BROKEN, None], r"rank 1 \(.*, pid {1}\) has not answered for 2 s: .*step 4, computing"),
    stop_first: ([None, BROKEN], r"rank 0 has not answered for 2 s \(it keeps the ranks' store.*"
                 r"rank 1 \(.*, pid {1}\) waits at step 4, computing, at fastalign/.*distributed.py:\d+, sum"),
    die_second: ([BROKEN, -signal.SIGKILL], r"rank 0, at step 30, computing: lost rank 1 \(.*, pid {1}\), last seen "
                 r"at step \d+, .*; the same command goes on"),
    die_first: ([-signal.SIGKILL, BROKEN], r"rank 1, at step 30, computing: lost rank 0 \(.*, pid {0}\), last seen "
                r"at step \d+, .*; the same command goes on"),
    err_second: ([BROKEN, 1], r"rank 0, at step 3, computing: lost rank 1 \(.*, pid {1}\), which ended with "
                 r"ValueError: a bug of one rank; the same command goes on"),
    slow_but_alive: ([0, 0], None),
    backward_hangs: ([BROKEN, BROKEN], r"rank 1 \(.*, pid {1}\) stopped responding at step 3: computing for 2 s, at "
                     r"tests/test_watchdog.py:\d+, forever"),
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
        with Watchdog(world, TIMEOUT) as watchdog:
            scene(watchdog, world)
        left = [thread.name for thread in threading.enumerate() if "watchdog" in thread.name]
        assert not left, left

    sys.exit(guarded(body))


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """All scenes at once, since they mostly sleep: exit codes, seconds, standard error and process ids of each."""
    context, folder = multiprocessing.get_context("forkserver"), tmp_path_factory.mktemp("scenes")
    context.set_forkserver_preload(["tests.test_watchdog"])
    processes = {}
    for scene, (codes, _) in SCENES.items():
        with socket.create_server(("localhost", 0)) as server:
            port = server.getsockname()[1]
        shared = (len(codes), port, str(folder / scene.__name__))
        processes[scene] = [context.Process(target=play, args=(scene, r, *shared)) for r in range(len(codes))]
        for process in processes[scene]:
            process.start()
    begin, ends = time.monotonic(), {}
    expected = {scene: [p for p, code in zip(ps, SCENES[scene][0]) if code is not None] for scene, ps in processes.items()}
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
        found[scene] = codes, ends.get(scene), path.read_text() if path.exists() else "", [p.pid for p in group]
    return found


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_scene(played, scene):
    codes, pattern = SCENES[scene]
    found, seconds, text, pids = played[scene]
    assert found == codes, text
    lines = [line for line in text.splitlines() if line.startswith("fastalign: ")]
    if pattern is None:
        assert text == ""
        return
    (line,) = lines
    assert re.search(pattern.format(*pids), line), line
