"""Two ranks of the training command: one is told to leave, one goes wrong, one stops."""

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
from tests.reliability.crash import Ranks, finish, lines_of, losses, write_recipe

pytestmark = needs_dali


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return str(write_recipe(tmp_path_factory.mktemp("recipe")))


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """The run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    finish([recipe, f"output={folder / 'run'}", "optim.epochs=3"], 2, folder=folder)
    return folder / "run"


def replace_forward(wrapped) -> None:
    """Calls `wrapped(forward, update, *arguments)` for each training pass; two of them are an update."""
    forward, passes = MaskEmbed.forward, [0]

    def replacement(self, *arguments):
        if not torch.is_grad_enabled():
            return forward(self, *arguments)
        passes[0] += 1
        return wrapped(functools.partial(forward, self), (passes[0] + 1) // 2, *arguments)

    MaskEmbed.forward = replacement


def poison(rank: int, update: int) -> None:
    def bad(forward, now, *arguments):
        loss = forward(*arguments)
        return loss * float("nan") if now == update and os.environ["RANK"] == str(rank) else loss

    replace_forward(bad)


def slow(seconds: float) -> None:
    def later(forward, now, *arguments):
        time.sleep(seconds)
        return forward(*arguments)

    replace_forward(later)


def stop(rank: int, update: int) -> None:
    def still(forward, now, *arguments):
        if now == update and os.environ["RANK"] == str(rank):
            time.sleep(1000)
        return forward(*arguments)

    replace_forward(still)


@pytest.mark.parametrize(
    ("told", "number", "code"),
    [([0], signal.SIGUSR1, 75), ([1], signal.SIGTERM, 75), ([0, 1], signal.SIGINT, 130)],
)
def test_a_signal_leads_both_ranks_to_one_checkpoint(recipe, tmp_path, whole, told, number, code):
    """And the run that goes on has the losses of the one that was left alone."""
    run = tmp_path / "run"
    arguments = [recipe, f"output={run}", "optim.epochs=3"]
    options = {"folder": tmp_path, "prepare": functools.partial(slow, 0.1)}
    with Ranks(arguments, 2, mercy=30, **options) as ranks:
        ranks.until(
            lambda: (run / "metrics.jsonl").exists() and '"loss"' in (run / "metrics.jsonl").read_text()
        )
        for rank in told:
            ranks.send(rank, number)
        assert ranks.wait() == [code, code]
        assert "Traceback" not in ranks.said()
        (line,) = (line for line in ranks.said(0).splitlines() if line.startswith("fastalign: "))
    step = losses_so_far = len(losses(run))
    assert line == (
        f"fastalign: {number.name}: saved {run} at step {step}; run the same command again to go on from there"
    )
    assert (run / "preempted").read_text() == f"{number.name} at step {step}\n"
    assert max((run / "checkpoints").glob("step-*.pt")).name == f"step-{step:08d}.pt"
    assert 3 <= losses_so_far < 18
    finish(arguments, 2, folder=tmp_path)
    assert not (run / "preempted").exists()
    assert lines_of(run) == lines_of(whole)


def test_a_second_interrupt_ends_the_run_at_once(recipe, tmp_path):
    """Also one that hangs; the first one alone would wait for the update."""
    run = tmp_path / "run"
    arguments = [recipe, f"output={run}", "faults.timeout=1000"]
    with Ranks(arguments, 1, folder=tmp_path, prepare=functools.partial(stop, 0, 3)) as ranks:
        ranks.until(lambda: "step 0: validation loss" in ranks.said())
        time.sleep(1)
        ranks.send(0, signal.SIGINT)
        time.sleep(0.5)
        assert ranks.running()
        ranks.send(0, signal.SIGINT)
        assert ranks.wait(10) == [-signal.SIGINT]
        assert "Traceback" not in ranks.said()


def impatient() -> None:
    """Rank 0 finds each checkpoint old at once; the other one never does."""
    runs.MAX_CHECKPOINT_AGE = 0.0 if os.environ["RANK"] == "0" else 1e9


def test_the_clock_of_one_rank_leads_both_to_checkpoints(recipe, tmp_path, whole):
    run = tmp_path / "run"
    arguments = [
        recipe,
        f"output={run}",
        "optim.epochs=3",
        "checkpoint.every_steps=null",
        "checkpoint.keep=99",
    ]
    finish([*arguments, "max_steps=6"], 2, folder=tmp_path, prepare=impatient)
    assert len(list((run / "checkpoints").glob("step-*.pt"))) == 6
    finish(arguments, 2, folder=tmp_path)
    assert len(list((run / "checkpoints").glob("step-*.pt"))) == 8, "of the clock, then of two epochs"
    assert lines_of(run) == lines_of(whole)


def test_a_signal_at_the_end_of_an_epoch_leaves_the_validation_for_later(recipe, tmp_path, whole):
    run = tmp_path / "run"
    arguments = [recipe, f"output={run}", "optim.epochs=3"]
    prepare = functools.partial(signal_myself, 6)
    with Ranks(arguments, 2, folder=tmp_path, mercy=30, prepare=prepare) as ranks:
        assert ranks.wait() == [75, 75]
    assert [line["step"] for line in lines_of(run) if "val_loss" in line] == [0]
    finish(arguments, 2, folder=tmp_path)
    assert lines_of(run) == lines_of(whole)


def signal_myself(update: int) -> None:
    def told(forward, now, *arguments):
        if now == update and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGUSR1)
        return forward(*arguments)

    replace_forward(told)


@pytest.mark.parametrize("shard", ["false", "true"])
def test_a_bad_number_on_one_rank_moves_no_weight_on_any(recipe, tmp_path, shard):
    run = tmp_path / "run"
    arguments = [recipe, f"output={run}", "max_steps=6", "checkpoint.every_steps=1", "checkpoint.keep=9"]
    arguments += [f"efficiency.shard={shard}", "data.val=null"]
    said = finish(arguments, 2, folder=tmp_path, prepare=functools.partial(poison, 1, 3))
    assert "the loss of rank 1 at step 3: not finite: this update was skipped" in said
    (line,) = map(json.loads, (run / "nonfinite.jsonl").read_text().splitlines())
    assert (line["step"], line["rank"], len(line["ids"]), len(line["names"])) == (3, 1, 4, 4)
    before, after = (
        torch.load(run / "checkpoints" / f"step-{step:08d}.pt", weights_only=True) for step in (2, 3)
    )
    for name, value in before["student"].items():
        assert torch.equal(value, after["student"][name]), name
    for moments, kept in zip(*(s["optimizer"]["state"].values() for s in (before, after)), strict=True):
        assert all(torch.equal(moments[name], kept[name]) for name in moments)
    assert [loss is None for loss in losses(run)] == [False, False, True, False, False, False]


@pytest.mark.slow
def test_a_rank_that_stops_is_named_and_the_run_goes_on_later(recipe, tmp_path, whole):
    run = tmp_path / "run"
    arguments = [recipe, f"output={run}", "optim.epochs=3", "faults.timeout=4"]
    with Ranks(arguments, 2, folder=tmp_path, mercy=9, prepare=functools.partial(stop, 1, 9)) as ranks:
        assert ranks.wait() == [70, 70]
        said = ranks.said()
    assert "rank 1 (" in said
    assert "hangs at step 8: computing for " in said
    assert 'test_faults_ranks.py", line ' in said
    assert "goes on from the newest checkpoint" in said
    finish(arguments, 2, folder=tmp_path)
    assert lines_of(run) == lines_of(whole)
