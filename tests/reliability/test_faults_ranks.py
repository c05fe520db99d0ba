"""Faults on one of two ranks of the training command: signals, bad numbers, hangs."""

import functools
import json
import os
import signal
import time

import pytest
import torch

from fastalign.method.objectives import MaskEmbed
from fastalign.training import run as runs
from tests.data_helpers import needs_dali
from tests.reliability.crash import Ranks, finish, lines_of, write_recipe
from tests.run_helpers import assert_same, checkpoint, losses

pytestmark = needs_dali


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return str(write_recipe(tmp_path_factory.mktemp("recipe")))


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    finish([recipe, f"output={folder / 'run'}", "optim.epochs=3"], 2, folder=folder)
    return folder / "run"


def break_forward(kind: str, rank: int, update: int) -> None:
    """For `prepare`: change the forward passes of one update (each has two) on one rank."""
    forward, passes = MaskEmbed.forward, [0]

    def broken(self, *arguments):
        passes[0] += torch.is_grad_enabled()
        now = torch.is_grad_enabled() and (passes[0] + 1) // 2 == update and os.environ["RANK"] == str(rank)
        if now and kind == "hang":
            time.sleep(1000)
        elif now and kind == "signal":
            os.kill(os.getpid(), signal.SIGUSR1)
        loss = forward(self, *arguments)
        return loss * float("nan") if now and kind == "nan" else loss

    MaskEmbed.forward = broken


def slow_down() -> None:
    forward = MaskEmbed.forward
    MaskEmbed.forward = lambda *arguments: (time.sleep(0.1), forward(*arguments))[1]


@pytest.mark.parametrize(
    ("targets", "number", "code"),
    [([0], signal.SIGUSR1, 75), ([1], signal.SIGTERM, 75), ([0, 1], signal.SIGINT, 130)],
)
def test_a_signal_to_any_rank_makes_all_save_and_the_run_goes_on(
    recipe, tmp_path, whole, targets, number, code
):
    run = tmp_path / "run"
    arguments = [recipe, f"output={run}", "optim.epochs=3"]
    with Ranks(arguments, 2, grace=30, folder=tmp_path, prepare=slow_down) as ranks:
        log = run / "metrics.jsonl"
        ranks.until(lambda: log.exists() and '"loss"' in log.read_text())
        for rank in targets:
            ranks.send(rank, number)
        if number != signal.SIGINT:  # a second interrupt would end the process
            for rank in range(2):
                ranks.send(rank, signal.SIGTERM)
        assert ranks.wait() == [code, code]
        assert "Traceback" not in ranks.output()
        lines = [line for line in ranks.output(0).splitlines() if line.startswith("fastalign: ")]
    step = len(losses(run))
    assert len(lines) == 1 + (number == signal.SIGINT), "an interrupt is acknowledged"
    assert lines[-1].startswith(
        f"fastalign: {number.name}: saved {run} at step {step}; run the same command again "
    )
    assert (run / "preempted").read_text() == f"{number.name} at step {step}\n"
    assert max((run / "checkpoints").glob("step-*.pt")).name == f"step-{step:08d}.pt"
    assert 3 <= step < 18
    finish(arguments, 2, folder=tmp_path)
    assert not (run / "preempted").exists()
    assert lines_of(run) == lines_of(whole)


def test_a_second_interrupt_ends_a_hanging_run_at_once(recipe, tmp_path):
    arguments = [recipe, f"output={tmp_path / 'run'}", "faults.timeout=1000"]
    hang = functools.partial(break_forward, "hang", 0, 3)
    with Ranks(arguments, 1, folder=tmp_path, prepare=hang) as ranks:
        ranks.until(lambda: "step 0: validation loss" in ranks.output())
        time.sleep(1)
        ranks.send(0, signal.SIGINT)
        time.sleep(0.5)
        assert ranks.running()
        ranks.send(0, signal.SIGINT)
        assert ranks.wait(10) == [-signal.SIGINT]
        assert "Traceback" not in ranks.output()


def checkpoint_always() -> None:
    """Rank 0 finds each checkpoint old at once; rank 1 never does."""
    runs.MAX_CHECKPOINT_AGE = 0.0 if os.environ["RANK"] == "0" else 1e9


def test_the_clock_of_rank_0_decides_when_all_save(recipe, tmp_path, whole):
    run = tmp_path / "run"
    arguments = [recipe, f"output={run}", "optim.epochs=3"]
    arguments += ["checkpoint.every_steps=null", "checkpoint.keep=99"]
    finish([*arguments, "max_steps=6"], 2, folder=tmp_path, prepare=checkpoint_always)
    assert len(list((run / "checkpoints").glob("step-*.pt"))) == 6
    finish(arguments, 2, folder=tmp_path)
    assert len(list((run / "checkpoints").glob("step-*.pt"))) == 8, "six by the clock, two at ends of epochs"
    assert lines_of(run) == lines_of(whole)


def test_a_signal_at_the_end_of_an_epoch_postpones_the_validation(recipe, tmp_path, whole):
    arguments = [recipe, f"output={tmp_path / 'run'}", "optim.epochs=3"]
    prepare = functools.partial(break_forward, "signal", 1, 6)
    with Ranks(arguments, 2, folder=tmp_path, grace=30, prepare=prepare) as ranks:
        assert ranks.wait() == [75, 75]
    assert [line["step"] for line in lines_of(tmp_path / "run") if "val_loss" in line] == [0]
    finish(arguments, 2, folder=tmp_path)
    assert lines_of(tmp_path / "run") == lines_of(whole)


def test_a_bad_number_on_one_rank_changes_no_weight_on_any(recipe, tmp_path):
    run = tmp_path / "run"
    arguments = [recipe, f"output={run}", "max_steps=6", "checkpoint.every_steps=1", "checkpoint.keep=9"]
    arguments += ["data.val=null"]
    text = finish(arguments, 2, folder=tmp_path, prepare=functools.partial(break_forward, "nan", 1, 3))
    assert "the loss of rank 1 at step 3: not finite: this update was skipped" in text
    (line,) = map(json.loads, (run / "nonfinite.jsonl").read_text().splitlines())
    assert (line["step"], line["rank"], len(line["ids"]), len(line["names"])) == (3, 1, 4, 4)
    for part in (lambda state: state["student"], lambda state: state["optimizer"]["state"]):
        assert_same(part(checkpoint(run, 3)), part(checkpoint(run, 2)))
    assert [loss is None for loss in losses(run)] == [False, False, True, False, False, False]


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_and_the_run_goes_on_later(recipe, tmp_path, whole):
    run = tmp_path / "run"
    arguments = [recipe, f"output={run}", "optim.epochs=3", "faults.timeout=4"]
    prepare = functools.partial(break_forward, "hang", 1, 9)
    with Ranks(arguments, 2, folder=tmp_path, grace=9, prepare=prepare) as ranks:
        assert ranks.wait() == [70, 70]
        lines = [line for line in ranks.output().splitlines() if line.startswith("fastalign: ")]
        assert 'test_faults_ranks.py", line ' in ranks.output(1), "the stack"
    assert lines[0].startswith("fastalign: rank 0: lost the connection to another rank: ")
    assert lines[1].startswith("fastalign: rank 1 (")
    assert "hangs at step 8: computing for " in lines[1]
    assert "resume from the newest checkpoint" in lines[1]
    assert len(lines) == 2
    finish(arguments, 2, folder=tmp_path)
    assert lines_of(run) == lines_of(whole)
