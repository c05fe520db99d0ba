"""A run that is killed at any moment, on any rank, and run again ends bit for bit as an uninterrupted one."""

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
from tests.reliability.crash import Ranks, finish, lines_of, write_recipe
from tests.run_helpers import assert_same, losses


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("resume"))


DROP_PATH = "student.kwargs.drop_path_rate=0.3"
SHORT = ["optim.epochs=2", DROP_PATH]
ONE_SAVE = ["optim.epochs=1", "checkpoint.every_steps=null", DROP_PATH]


@pytest.fixture(scope="module")
def uninterrupted(recipe, tmp_path_factory):
    """Runs with some options that nothing interrupts."""

    @functools.cache
    def run(*options: str) -> Path:
        folder = tmp_path_factory.mktemp("whole")
        finish([str(recipe), *options, f"output={folder / 'run'}"], 1, folder=folder)
        return folder / "run"

    return run


def backbone_of(run: Path) -> dict:
    """The file's tensors and its metadata."""
    with safetensors.safe_open(run / "backbone.safetensors", "pt") as file:
        metadata = sorted(file.metadata().items())  # whose order in the file varies
        return {"metadata": metadata, **{name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118


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


KILLED_IN = {
    "update": (train, "update", lambda *_: True),
    "validation": (MaskEmbed, "forward", lambda self, images, ids, epoch=0: epoch == EVAL_EPOCH),
    "removal": (Path, "unlink", lambda path, **_: path.name == "step-00000006.pt"),
    "write": (torch, "save", lambda *_: True),
    "rename": (os, "replace", lambda _, target: Path(target).parent.name in ("run", "checkpoints")),
}
"""Functions, and the calls of them that count."""


def die(place: str, number: int, rank: int | None = None) -> None:
    """For `prepare`: kill a rank (or any) at that call, from 1; then a rename is done, or a file half written."""
    if rank not in (None, int(os.environ["RANK"])):
        return
    owner, name, counts = KILLED_IN[place]
    call, left = getattr(owner, name), [number]

    def counting(*arguments, **options):
        left[0] -= counts(*arguments, **options)
        if left[0] == 0:
            if place == "rename":
                call(*arguments)
            if place == "write":
                arguments[1].write(bytes(5000))
                arguments[1].flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **options)

    setattr(owner, name, counting)
    if place == "rename":
        Path.replace = counting


def slow_disk(seconds: float) -> None:
    """For `prepare`: flushing a file takes long enough for a kill."""
    flush = os.fsync
    os.fsync = lambda handle: (time.sleep(seconds), flush(handle))[1]


def half_written(run: Path, writer: int) -> list[Path]:
    """Temporary files of a process's checkpoints."""
    return list((run / "checkpoints").glob(f".step-*.pt.{writer}*"))


@needs_dali
@pytest.mark.parametrize(
    ("options", "place", "kept"),
    [
        (SHORT, ("update", 11), ["06", "08"]),  # between two checkpoints
        (SHORT, ("write", 4), ["06", "08"]),  # in a half-written checkpoint
        (SHORT, ("removal", 1), ["06", "08", "12"]),  # before the last removal
        # Renames of the configuration, of the only checkpoint, of the best one, of the backbone's weights and facts.
        *(
            pytest.param(ONE_SAVE, ("rename", n), ["06"][: n - 1], marks=pytest.mark.slow)
            for n in range(1, 6)
        ),
    ],
)
def test_a_killed_rank_leaves_no_trace(recipe, tmp_path, uninterrupted, options, place, kept):
    arguments = [str(recipe), *options, f"output={tmp_path / 'run'}"]
    with Ranks(arguments, 1, folder=tmp_path, prepare=functools.partial(die, *place)) as ranks:
        assert ranks.wait() == [-signal.SIGKILL]
    assert sorted(path.stem[-2:] for path in (tmp_path / "run/checkpoints").glob("step-*")) == kept
    finish(arguments, 1, folder=tmp_path)
    assert_same_run(tmp_path / "run", uninterrupted(*options))


KILLS = [
    functools.partial(die, "update", 4),
    functools.partial(die, "validation", 3, 0),
    functools.partial(die, "validation", 5, 1),
    functools.partial(die, "update", 9),
    "while a checkpoint is written",
    functools.partial(die, "update", 9),
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
                assert ranks.until(lambda ranks=ranks: half_written(run, ranks.pid(0)))
                ranks.send(0)
            elif isinstance(kill, str):
                moment = time.monotonic() + draw.uniform(0.4, 1.6)
                ranks.until(lambda moment=moment: time.monotonic() > moment)
                ranks.send(draw.randrange(2))
            codes = ranks.wait()
        assert -signal.SIGKILL in codes or (kill == "at any time" and codes == [0, 0]), (codes, kill)
    finish(arguments, 2, folder=tmp_path)
    assert_same_run(run, truth)
