"""A run that is killed at any moment, on any rank, ends bit for bit as one that is not killed."""

import functools
import os
import random
import signal
import time
from pathlib import Path

import pytest
import safetensors
import torch

from fastalign import MaskEmbed, train
from fastalign.utils.random import EVAL_EPOCH
from tests.data_helpers import needs_dali
from tests.reliability.crash import Ranks, finish, lines_of, losses, write_recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("resume"))


DROP_PATH = "student.kwargs.drop_path_rate=0.3"
SHORT = ["optim.epochs=2", DROP_PATH]
ONE_SAVE = ["optim.epochs=1", "checkpoint.every_steps=null", DROP_PATH]


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """A short run that nobody kills."""
    folder = tmp_path_factory.mktemp("whole")
    finish([str(recipe), *SHORT, f"output={folder / 'run'}"], 1, folder=folder)
    return folder / "run"


@pytest.fixture(scope="module")
def once(recipe, tmp_path_factory):
    """A run with a single save."""
    folder = tmp_path_factory.mktemp("once")
    finish([str(recipe), *ONE_SAVE, f"output={folder / 'run'}"], 1, folder=folder)
    return folder / "run"


def assert_same(found, wanted, where: str) -> None:
    """Nested containers of tensors and plain values, to the bit."""
    assert type(found) is type(wanted), where
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for key, value in wanted.items():
            assert_same(found[key], value, f"{where}.{key}")
    elif isinstance(wanted, torch.Tensor):
        assert torch.equal(found, wanted), where
    elif isinstance(wanted, (list, tuple)):
        assert len(found) == len(wanted), where
        for index, value in enumerate(wanted):
            assert_same(found[index], value, f"{where}[{index}]")
    else:
        assert found == wanted, where


def backbone_of(run: Path) -> dict:
    """The file's tensors and what is written beside them; the library writes the latter in any order."""
    with safetensors.safe_open(run / "backbone.safetensors", "pt") as file:
        return {"metadata": file.metadata(), **{name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118


def assert_same_run(found: Path, wanted: Path) -> None:
    """Metrics, checkpoints with weights, averages and moments, the best one, and the backbone: all to the bit."""
    assert_same(lines_of(found), lines_of(wanted), "metrics")
    names = sorted(path.name for path in (wanted / "checkpoints").iterdir())
    assert sorted(path.name for path in (found / "checkpoints").iterdir()) == names
    for name in names:
        states = [torch.load(run / "checkpoints" / name, weights_only=True) for run in (found, wanted)]
        for state in states:
            del state["config"]["output"]
        assert_same(*states, name)
    assert (found / "backbone.json").read_text() == (wanted / "backbone.json").read_text()
    assert_same(backbone_of(found), backbone_of(wanted), "backbone")


# What ranks do to themselves; each is called in a rank, before the command.


def slow_disk(seconds: float) -> None:
    """Flushing a file takes its time: a checkpoint is being written for long enough to be killed there."""
    flush = os.fsync
    os.fsync = lambda handle: (time.sleep(seconds), flush(handle))[1]


def die_at_rename(number: int, *, after: bool, folder: Path) -> None:
    """Rank 0 is killed just before or just after its rename of that number in `folder`, from 1: between two files."""
    if os.environ["RANK"] != "0":
        return
    rename, left = os.replace, [number]

    def replace(source, target) -> None:
        left[0] -= folder in Path(target).parents
        if left[0] == 0 and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace
    Path.replace = replace


def die_before_removing(name: str) -> None:
    """A rank is killed when it is about to remove a file of this name."""
    unlink = Path.unlink

    def checking(self, missing_ok=False) -> None:
        if self.name == name:
            os.kill(os.getpid(), signal.SIGKILL)
        unlink(self, missing_ok=missing_ok)

    Path.unlink = checking


def die_in_update(step: int) -> None:
    """A rank is killed when it has made so many updates."""
    update = train.update

    def counting(run, batches, epoch):
        if run.state.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return update(run, batches, epoch)

    train.update = counting


def die_in_validation(rank: int, number: int) -> None:
    """A rank is killed at its validation batch of that number, from 1."""
    if int(os.environ["RANK"]) != rank:
        return
    forward, left = MaskEmbed.forward, [number]

    def counting(self, images, sample_ids, epoch=0):
        left[0] -= epoch == EVAL_EPOCH
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(self, images, sample_ids, epoch)

    MaskEmbed.forward = counting


def half_written(run: Path, writer: int) -> list[Path]:
    """A process's checkpoints under their temporary names."""
    return list((run / "checkpoints").glob(f".step-*.pt.{writer}*"))


@needs_dali
def test_a_killed_rank_leaves_no_trace(recipe, tmp_path, whole):
    """The quick case: one rank, one kill, between two checkpoints."""
    arguments = [str(recipe), *SHORT, f"output={tmp_path / 'run'}"]
    with Ranks(arguments, 1, folder=tmp_path, prepare=functools.partial(die_in_update, 10)) as ranks:
        assert ranks.wait() == [-signal.SIGKILL]
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert kept == ["step-00000006.pt", "step-00000008.pt"]
    finish(arguments, 1, folder=tmp_path)
    assert_same_run(tmp_path / "run", whole)


@needs_dali
def test_what_a_kill_kept_from_being_removed_is_removed(recipe, tmp_path, whole):
    """The last save's: the run has nothing left to do but that."""
    arguments = [str(recipe), *SHORT, f"output={tmp_path / 'run'}"]
    prepare = functools.partial(die_before_removing, "step-00000006.pt")
    with Ranks(arguments, 1, folder=tmp_path, prepare=prepare) as ranks:
        assert ranks.wait() == [-signal.SIGKILL]
    assert (tmp_path / "run" / "checkpoints" / "step-00000012.pt").exists()
    finish(arguments, 1, folder=tmp_path)
    assert_same_run(tmp_path / "run", whole)


KILLS = [
    functools.partial(die_in_update, 3),
    functools.partial(die_in_validation, 0, 3),
    functools.partial(die_in_validation, 1, 5),
    functools.partial(die_in_update, 17),
    "while a checkpoint is written",
    functools.partial(die_in_update, 29),
    "while a checkpoint is written",
    "at any time",
    "at any time",
]


@pytest.mark.slow
@needs_dali
def test_many_kills_of_two_ranks_leave_no_trace(recipe, tmp_path):
    """One kill after the other, compared with the run that is not killed."""
    truth, run = tmp_path / "truth", tmp_path / "killed"
    finish([str(recipe), DROP_PATH, f"output={truth}"], 2, folder=tmp_path)
    scale = torch.load(truth / "checkpoints" / "best.pt", weights_only=True)["target_scale"]
    assert scale == pytest.approx(1 / 3, abs=0.05)
    assert len(set(losses(truth))) == 48
    arguments, draw = [str(recipe), DROP_PATH, f"output={run}"], random.Random(0)
    for kill in KILLS:
        writing, grace = kill == "while a checkpoint is written", draw.choice([0.0, 0.5])
        prepare = functools.partial(slow_disk, 0.5) if writing else None if isinstance(kill, str) else kill
        with Ranks(arguments, 2, folder=tmp_path, prepare=prepare, grace=grace) as ranks:
            if writing:
                assert ranks.until(lambda ranks=ranks: half_written(run, ranks.pids[0]))
                ranks.send(0)
            elif isinstance(kill, str):
                moment = time.monotonic() + draw.uniform(0.4, 1.6)
                ranks.until(lambda moment=moment: time.monotonic() > moment)
                ranks.send(draw.randrange(2))
            codes = ranks.wait()
        assert -signal.SIGKILL in codes or (kill == "at any time" and codes == [0, 0]), (codes, kill)
    finish(arguments, 2, folder=tmp_path)
    assert_same_run(run, truth)


@pytest.mark.slow
@needs_dali
@pytest.mark.parametrize("number", [1, 2, 3, 4])
@pytest.mark.parametrize("after", [False, True])
def test_a_save_cut_short_between_its_files_is_made_good(recipe, tmp_path, once, number, after):
    """Killed before or after each rename of the only save of a run: the checkpoint, the best one, the backbone."""
    arguments = [str(recipe), *ONE_SAVE, f"output={tmp_path / 'run'}"]
    prepare = functools.partial(die_at_rename, number, after=after, folder=tmp_path / "run")
    with Ranks(arguments, 1, folder=tmp_path, prepare=prepare) as ranks:
        assert ranks.wait() == [-signal.SIGKILL]
    finish(arguments, 1, folder=tmp_path)
    assert_same_run(tmp_path / "run", once)
