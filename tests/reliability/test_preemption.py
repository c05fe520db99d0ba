"""SIGTERM and SIGUSR1, to real processes: one rank is asked, all save and leave with 75; what scripts make of it."""

import multiprocessing
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastalign.training import distributed
from fastalign.training.command import run_command
from fastalign.training.preemption import (
    MARKER,
    PREEMPTED,
    Preempted,
    Preemption,
    StopReason,
    clear_marker,
    preempted,
)

ROOT = Path(__file__).parents[2]
PRELOAD = ["tests.reliability.test_preemption"]
"""what the server of forks imports once for all processes"""


@pytest.fixture(autouse=True)
def _old_handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_are_remembered_and_kill_nothing(number):
    heard = []
    signal.signal(number, lambda *_: heard.append("the old handler"))
    with Preemption() as preemption:
        assert preemption.reason == 0
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.reason == number
    assert heard == []
    os.kill(os.getpid(), number)
    assert heard == ["the old handler"]


def test_an_interrupt_is_remembered_once_and_only_while_there_is_something_to_save(tmp_path):
    with Preemption() as preemption:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert preemption.reason == 0
        preemption.hold_interrupts()
        signal.raise_signal(signal.SIGINT)
        assert preemption.reason == signal.SIGINT
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL, (
            "a second one needs no Python to end the process"
        )
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler

    def leave() -> None:
        with Preemption() as preemption:
            preemption.hold_interrupts()
            signal.raise_signal(signal.SIGINT)
            raise preempted(tmp_path, preemption.reason, 3, main=False)

    with pytest.raises(Preempted) as caught:
        leave()
    assert caught.value.code == 130
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler, (
        "a program that called the command goes on"
    )
    assert preempted(tmp_path, StopReason.SIGTERM, 3, main=False).code == PREEMPTED == 75
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a script's `command &` has it
    with Preemption() as preemption:
        preemption.hold_interrupts()
        signal.raise_signal(signal.SIGINT)
        assert preemption.reason == 0
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_an_interrupted_command_is_one_line(capsys, monkeypatch):
    def body():
        signal.raise_signal(signal.SIGINT)

    assert run_command(body) == 130
    assert capsys.readouterr().err == "fastalign: interrupted\n"
    monkeypatch.setenv("RANK", "1")
    assert run_command(body) == 130
    assert capsys.readouterr().err == ""


def test_other_errors_bring_the_old_handlers_back_and_preempted_does_not(tmp_path):
    for error in (ValueError("x"), preempted(tmp_path, StopReason.SIGTERM, 3, main=False)):
        with pytest.raises(type(error)), Preemption():
            raise error
        leaving = isinstance(error, Preempted)
        assert signal.getsignal(signal.SIGTERM) == (signal.SIG_IGN if leaving else signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)  # as torchrun does to the rest when the first rank has left


def test_the_marker_is_there_from_leaving_to_going_on(tmp_path):
    error = preempted(tmp_path, StopReason.SIGUSR1, 7, main=True)
    assert re.fullmatch(
        rf"SIGUSR1: saved {re.escape(str(tmp_path))} at step 7; run the same command .*", str(error)
    )
    assert (tmp_path / MARKER).read_text() == "SIGUSR1 at step 7\n"
    clear_marker(tmp_path)
    clear_marker(tmp_path)
    preempted(tmp_path, StopReason.SIGUSR1, 8, main=False)
    assert list(tmp_path.iterdir()) == []


def loop(folder: Path, kept: Preemption, world: distributed.World) -> None:
    """A run whose ranks share the signal in each step, and whose checkpoint takes a second."""
    step = torch.zeros(1)
    while True:
        number = torch.tensor([kept.reason])
        step += 1
        if world.size > 1:
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
        (folder / f"running-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}-{world.rank}").touch()
        if number.item():
            if world.main:
                (folder / "saving").touch()
                time.sleep(1)
                (folder / "checkpoint").write_text(f"{int(step)}")
            world.barrier()
            raise preempted(folder, StopReason(int(number)), int(step), main=world.main)
        time.sleep(0.02)


def rank_of_two(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.dup2(os.open(folder / f"stderr-{rank}", os.O_CREAT | os.O_WRONLY), 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}

    def body():
        world = distributed.start()
        with Preemption() as kept:
            loop(folder, kept, world)

    code = run_command(body)
    os.kill(os.getpid(), signal.SIGTERM)  # does no more harm on the way out
    sys.exit(code)


def wait_for(path: Path, seconds: float = 40) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} never came"
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "rank"), [(signal.SIGTERM, 1), (signal.SIGUSR1, 0)])
def test_a_signal_to_any_rank_leads_all_to_one_checkpoint(tmp_path, number, rank):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    ranks = [context.Process(target=rank_of_two, args=(r, port, tmp_path)) for r in range(2)]
    for process in ranks:
        process.start()
    for r in range(2):
        wait_for(tmp_path / f"running-0-{r}")
    os.kill(ranks[rank].pid, number)
    wait_for(tmp_path / "saving")
    for process in ranks:  # both are told again while one saves and the other waits for it
        os.kill(process.pid, signal.SIGTERM)
    for process in ranks:
        process.join(20)
    assert [process.exitcode for process in ranks] == [PREEMPTED, PREEMPTED]
    step = (tmp_path / "checkpoint").read_text()
    assert (tmp_path / MARKER).read_text() == f"{number.name} at step {step}\n"
    line = f"fastalign: {number.name}: saved {tmp_path} at step {step}; run the same command again"
    assert (tmp_path / "stderr-0").read_text().startswith(line)
    assert (tmp_path / "stderr-1").read_text() == ""


PROGRAM = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from fastalign.training import distributed
from fastalign.training.command import run_command
from fastalign.training.preemption import Preemption, clear_marker
from tests.reliability.test_preemption import loop
folder = Path(sys.argv[1])
def body():
    world = distributed.start()
    if world.main:
        clear_marker(folder)
    attempt, newest = os.environ["TORCHELASTIC_RESTART_COUNT"], folder / "checkpoint"
    (folder / f"start-{attempt}-{world.rank}").write_text(newest.read_text() if newest.exists() else "none")
    world.barrier()
    with Preemption() as kept:
        if attempt == "0" and world.rank == 1:
            newest.write_text("12")
            os.kill(os.getpid(), signal.SIGKILL)
        loop(folder, kept, world)
sys.exit(run_command(body))
"""


@pytest.mark.slow
def test_torchrun_starts_all_again_after_a_kill_and_hands_a_signal_on(tmp_path):
    """The killed worker's peer ignores torchrun's SIGTERM in its loop, and must lose its connection instead.

    The new ranks must not read the dead ones' addresses, which torchrun's store still has. Then torchrun is asked to
    leave: it tells all, waits, and ends with 1, not with 75; the marker is there all the same.
    """
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    options = ["--max-restarts=1", "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *options]
    command += [str(program), str(tmp_path), str(ROOT)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        try:
            for r in range(2):
                wait_for(tmp_path / f"running-1-{r}", seconds=90)
            process.send_signal(signal.SIGUSR1)
            assert process.wait(45) == 1
        finally:
            process.terminate()  # torchrun ends its workers then; no harm where it has ended
            process.wait(45)
    text = (tmp_path / "output").read_text()
    starts = {path.name: path.read_text() for path in tmp_path.glob("start-*")}
    assert starts == {"start-0-0": "none", "start-0-1": "none", "start-1-0": "12", "start-1-1": "12"}
    assert len(re.findall("fastalign: rank 0: lost the connection to another rank: run again", text)) == 1
    assert (tmp_path / MARKER).read_text() == f"SIGUSR1 at step {(tmp_path / 'checkpoint').read_text()}\n"
    assert len(re.findall("fastalign: SIGUSR1: saved", text)) == 1


FAKES = {
    "scontrol": 'if [ "$1" = show ]; then echo first; echo second; else echo "$@" >> "$PLACE/asked"; fi',
    "srun": 'kill -TERM $PPID; shift; SLURM_PROCID=5 SLURM_LOCALID=1 "$@"',  # one task of eight
    "python": 'echo $MASTER_ADDR $MASTER_PORT $RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE "$@"; . "$PLACE/rank"',
}


@pytest.mark.parametrize(("end", "code"), [("preempted", 75), ("preempted", 143), ("error", 2), ("done", 0)])
def test_the_job_asks_for_another_turn_when_it_was_preempted_and_only_then(tmp_path, end, code):
    for name, text in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    lines = [f"mkdir -p '{tmp_path}/run one'"]
    lines += [f"touch '{tmp_path}/run one/preempted'"] * (end == "preempted")
    (tmp_path / "rank").write_text("\n".join([*lines, f"exit {code}"]))
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PLACE": str(tmp_path),
        "SLURM_JOB_ID": "123456",
    }
    environment |= {"SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4", "SLURM_JOB_NODELIST": "n[1-2]"}
    command = ["bash", str(ROOT / "examples/slurm.sbatch"), "a.yaml", f"{tmp_path}/run one", "data.train=a b"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code
    told = f"first 23456 5 1 8 4 -m fastalign.train a.yaml output={tmp_path}/run one data.train=a b\n"
    assert done.stdout == told
    asked = tmp_path / "asked"
    assert (asked.read_text() if asked.exists() else None) == (
        "requeue 123456\n" if end == "preempted" else None
    )


def test_what_the_elastic_example_passes_is_what_torchrun_takes(tmp_path):
    (tmp_path / "torchrun").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "torchrun").chmod(0o755)
    command = [str(ROOT / "examples/elastic.sh"), "host:29400", "configs/clip-vit-b.yaml", "output=a b"]
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    from torch.distributed.run import config_from_args, get_args_parser

    options = get_args_parser().parse_args(shown.splitlines())
    config, _, arguments = config_from_args(options)
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node, config.max_restarts) == (1, 4, 4, 3)
    assert (config.rdzv_backend, config.rdzv_endpoint) == ("c10d", "host:29400")
    assert all(hasattr(signal, name) for name in config.signals_to_handle.split(","))
    assert arguments[-4:] == ["-m", "fastalign.train", "configs/clip-vit-b.yaml", "output=a b"]


@pytest.mark.parametrize("name", ["slurm.sbatch", "elastic.sh"])
def test_the_scripts_are_bash(name):
    path = ROOT / "examples" / name
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert os.access(path, os.X_OK)
    assert shlex.split(path.read_text().splitlines()[0][2:]) == ["/bin/bash"]
