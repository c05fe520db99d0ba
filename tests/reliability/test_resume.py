"""A run that is killed, at any moment and on any rank, ends as one that nobody killed: to the bit."""

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


class Killer:
    """Kills the ranks of a run at random moments, of kinds that come in a random order.

    Args:
        kinds: how often each kind; see `_once`.
        seed: of everything random.
    """

    def __init__(self, kinds: dict[str, int], seed: int, scratch: Path):
        self.draw, self.scratch = random.Random(seed), scratch
        self.left = [kind for kind, count in kinds.items() for _ in range(count)]
        self.draw.shuffle(self.left)
        self.missed = 0

    def until_finished_or_done(self, arguments: list[str], run: Path) -> bool:
        """Start the run again and again and kill it. Returns whether it was not killed in the end."""
        while self.left:
            codes, hit = self._once(self.left[-1], arguments, run)
            if codes == [0, 0]:
                return True
            assert -signal.SIGKILL in codes, (codes, self.left[-1])
            if hit:
                self.left.pop()
            self.missed += not hit
            assert self.missed < 10, self.left[-1]
        return False

    def _once(self, kind: str, arguments: list[str], run: Path) -> tuple[list[int], bool]:
        """One start. Returns the exit codes, and whether it was killed as the kind says."""
        draw, prepare = self.draw, None
        rank = draw.randrange(2)
        if kind == "while a checkpoint is written":
            prepare, rank = functools.partial(slow_disk, 0.5), 0
        elif kind == "between two files":
            prepare = functools.partial(
                die_at_rename, draw.randint(1, 8), after=draw.random() < 0.5, folder=run
            )
        elif kind == "in validation":
            prepare = functools.partial(die_in_validation, rank, draw.randint(1, 4))
        options = {"folder": self.scratch, "prepare": prepare, "mercy": draw.choice([0.0, 0.5])}
        with Ranks(arguments, 2, **options) as ranks:
            if kind == "while it starts":
                ranks.until(after(draw.uniform(0.0, 0.4)))
                ranks.send(rank)
            elif kind == "at any time":
                ranks.until(after(draw.uniform(0.4, 1.6)))
                ranks.send(rank)
            elif kind == "while a checkpoint is written" and ranks.until(
                lambda: half_written(run, ranks.pids[0])
            ):
                ranks.until(after(draw.uniform(0.0, 0.03)))
                ranks.send(rank)
            codes = ranks.wait()
        return codes, kind != "while a checkpoint is written" or bool(half_written(run, ranks.pids[0]))


def after(seconds: float):
    """True so many seconds from now."""
    moment = time.monotonic() + seconds
    return lambda: time.monotonic() > moment


def half_written(run: Path, writer: int) -> list[Path]:
    """A process's checkpoints that do not have their names yet."""
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


@pytest.mark.slow
@needs_dali
def test_twenty_kills_leave_no_trace(recipe, tmp_path):
    """On two ranks; the truth is the run that nobody kills."""
    truth, options = tmp_path / "truth", [str(recipe), DROP_PATH]
    finish([*options, f"output={truth}"], 2, folder=tmp_path)
    scale = torch.load(truth / "checkpoints" / "best.pt", weights_only=True)["target_scale"]
    assert scale == pytest.approx(1 / 3, abs=0.05)
    assert len(set(losses(truth))) == 48
    kinds = {"at any time": 7, "while a checkpoint is written": 5, "between two files": 4}
    kinds |= {"in validation": 2, "while it starts": 2}
    killer, finished = Killer(kinds, 0, tmp_path), 0
    while killer.left:
        run = tmp_path / f"killed-{finished}"
        arguments = [*options, f"output={run}"]
        if not killer.until_finished_or_done(arguments, run):
            finish(arguments, 2, folder=tmp_path)
        assert_same_run(run, truth)
        finished += 1


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
