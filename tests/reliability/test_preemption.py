"""Preemption: what signals do to a process, torchrun that restarts and hands signals on, and the example scripts."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastalign.training.command import Preempted, Preemption, StopReason, run_command
from tests.data_helpers import needs_dali
from tests.reliability.crash import write_recipe
from tests.run_helpers import losses

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("reason", [StopReason.SIGTERM, StopReason.SIGUSR1])
def test_the_first_signal_is_remembered(reason, tmp_path):
    heard = []
    signal.signal(reason, lambda *_: heard.append("the old handler"))
    with Preemption() as preemption:
        assert preemption.reason is StopReason.NONE
        for number in (reason, signal.SIGTERM, signal.SIGUSR1):
            signal.raise_signal(number)
        assert preemption.reason is reason
    assert heard == []
    signal.raise_signal(reason)
    assert heard == ["the old handler"]
    with pytest.raises(Preempted), Preemption():
        raise Preempted(tmp_path, reason, 7)
    signal.raise_signal(reason)  # as torchrun does to the other ranks when the first has ended
    assert heard == ["the old handler"]


def test_an_interrupt_is_remembered_from_the_first_update_unless_it_is_ignored(capfd):
    with Preemption() as preemption:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        preemption.hold_interrupts()
        signal.raise_signal(signal.SIGINT)
        assert "saving soon; a second one ends the run at once" in capfd.readouterr().err
        assert preemption.reason is StopReason.SIGINT
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL, "a second one ends the process"
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as for `command &` in a shell script
    with Preemption() as preemption:
        preemption.hold_interrupts()
        signal.raise_signal(signal.SIGINT)
        assert preemption.reason is StopReason.NONE
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


@pytest.mark.parametrize(("rank", "line"), [("0", "fastalign: interrupted\n"), ("1", "")])
def test_an_interrupted_command_prints_one_line(capsys, monkeypatch, rank, line):
    monkeypatch.setenv("RANK", rank)
    assert run_command(lambda: signal.raise_signal(signal.SIGINT)) == 130
    assert capsys.readouterr().err == line
    monkeypatch.setattr(sys, "stdout", None)  # closed by the caller
    assert run_command(lambda: None) == 0


PROGRAM = """
import os, signal, sys
from fastalign import train
update = train.update

def killed(run, *rest):
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and run.world.rank == 1 and run.state.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return update(run, *rest)

train.update = killed
sys.exit(train.main())
"""


@pytest.mark.slow
@needs_dali
def test_torchrun_restarts_after_a_kill_and_hands_a_signal_on(tmp_path):
    """The killed rank's peer ignores torchrun's SIGTERM and ends because its connection is lost.

    When torchrun itself gets a signal, it exits with 1, not 75, but the marker exists.
    """
    program, recipe, run = tmp_path / "program.py", write_recipe(tmp_path), tmp_path / "run"
    program.write_text(PROGRAM)
    options = ["--max-restarts=1", "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *options]
    command += [str(program), str(recipe), f"output={run}", "optim.epochs=999"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        try:
            end = time.monotonic() + 90
            while not (run / "metrics.jsonl").exists() or len(losses(run)) < 9:
                assert time.monotonic() < end, (tmp_path / "output").read_text()
                time.sleep(0.1)
            process.send_signal(signal.SIGUSR1)
            assert process.wait(45) == 1
        finally:
            process.terminate()
            process.wait(45)
    text = (tmp_path / "output").read_text()
    for line in (
        "resuming .* at step 4 of",
        "fastalign: rank 0: lost the connection to another rank: run again",
    ):
        assert len(re.findall(line, text)) == 1, text
    assert (run / "preempted").exists()
    assert len(re.findall("fastalign: SIGUSR1: saved", text)) == 1


def write_programs(folder: Path, programs: dict[str, str]) -> None:
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)


@pytest.mark.parametrize(("end", "code"), [("preempted", 75), ("preempted", 143), ("error", 2), ("done", 0)])
def test_the_slurm_job_is_requeued_if_it_was_preempted_and_only_then(tmp_path, end, code):
    run = f"{tmp_path}/run one"
    command = 'echo $MASTER_ADDR $MASTER_PORT $RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE "$@"'
    command += f"; mkdir -p '{run}'" + (f"; touch '{run}/preempted'" if end == "preempted" else "")
    scontrol = 'if [ "$1" = show ]; then echo first; echo second; else echo "$@" >> "$PLACE/asked"; fi'
    srun = 'kill -TERM $PPID; shift; SLURM_PROCID=5 SLURM_LOCALID=1 "$@"'  # one task of eight
    write_programs(tmp_path, {"scontrol": scontrol, "srun": srun, "fastalign": f"{command}; exit {code}"})
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PLACE": str(tmp_path)}
    slurm = ["JOB_ID=123456", "NTASKS=8", "NTASKS_PER_NODE=4", "JOB_NODELIST=n[1-2]"]
    environment |= dict(f"SLURM_{each}".split("=") for each in slurm)
    line = ["bash", str(ROOT / "examples/slurm.sbatch"), "a.yaml", run, "data.train=a b"]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stdout == f"first 23456 5 1 8 4 train a.yaml output={run} data.train=a b\n"
    asked = tmp_path / "asked"
    assert (asked.read_text() if asked.exists() else "") == ("requeue 123456\n" if end == "preempted" else "")


def test_torchrun_takes_the_arguments_of_the_elastic_example(tmp_path):
    from torch.distributed.run import config_from_args, get_args_parser

    write_programs(tmp_path, {"torchrun": 'printf "%s\\n" "$@"'})
    command = [str(ROOT / "examples/elastic.sh"), "host:29400", "configs/clip-vit-b.yaml", "output=a b"]
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    config, _, arguments = config_from_args(get_args_parser().parse_args(shown.splitlines()))
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node, config.max_restarts) == (1, 4, 4, 3)
    assert (config.rdzv_backend, config.rdzv_endpoint) == ("c10d", "host:29400")
    assert all(hasattr(signal, name) for name in config.signals_to_handle.split(","))
    assert arguments[-4:] == ["-m", "fastalign.train", "configs/clip-vit-b.yaml", "output=a b"]
