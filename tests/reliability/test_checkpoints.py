"""Checkpoints with full and failing disks, killed writers and flipped bits."""

import copy
import errno
import os
import re
import resource
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from fastalign import train
from fastalign.training import checkpoint_files
from fastalign.training.checkpoint_files import Checkpoints
from fastalign.training.distributed import World
from fastalign.training.update import MovingAverage
from fastalign.utils.errors import UserError
from fastalign.utils.files import lock_folder, remove_leftovers, write_atomically
from tests.run_helpers import assert_same, checkpoint, flip, losses, middle_of_weights

OPTIONS = ["optim.ema=0.9", "checkpoint.every_steps=2"]
ALONE = World(0, 1, torch.device("cpu"))


def state_of(step: int, best: bool = False) -> dict:
    """Tensors that are a function of the step."""
    numbers = torch.randn(1000, generator=torch.Generator().manual_seed(step))
    return {"step": step, "is_best": best, "a": numbers, "b": torch.full((3,), step)}


def same(found: dict, step: int) -> bool:
    wanted = state_of(step)
    return found["step"] == step and all(torch.equal(found[name], wanted[name]) for name in "ab")


def written(folder: Path, *steps: int, keep: int = 9) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep=keep)
    for step in steps:
        checkpoints.save(state_of(step), step)
    checkpoints.wait()
    return checkpoints


@pytest.fixture
def gate(monkeypatch):
    """A disk that writes nothing until the test sets this event."""
    opened, write = threading.Event(), checkpoint_files.write_atomically

    def slow(path, content):
        assert opened.wait(30)
        write(path, content)

    monkeypatch.setattr(checkpoint_files, "write_atomically", slow)
    yield opened
    opened.set()


def test_later_updates_do_not_change_a_snapshot(tmp_path, gate):
    module = torch.nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
    average, plain = MovingAverage(module, 0.5), {"steps": [1, 2], "nested": {"x": (1, None, "text")}}

    def step():
        module(torch.ones(2, 5)).square().sum().backward()
        optimizer.step()
        average.update()

    step()
    state = {"m": module.state_dict(), "o": optimizer.state_dict(), "a": average.state, "plain": plain}
    state |= {"half": torch.arange(6).reshape(2, 3).bfloat16().t(), "empty": torch.ones(0)}
    wanted, checkpoints = copy.deepcopy(state), Checkpoints(tmp_path, keep=1)
    checkpoints.save(state, 1)
    step()
    optimizer.param_groups[0]["lr"] = 7.0
    plain["steps"].append(3)
    plain["nested"]["x"] = "other"
    assert not torch.equal(module.weight, wanted["m"]["weight"])
    gate.set()
    checkpoints.wait()
    assert_same(checkpoints.resume(ALONE)[1], wanted)


@pytest.mark.parametrize("linked", [True, False])
def test_the_newest_and_the_best_are_kept(tmp_path, monkeypatch, linked):
    """Also on a file system without hard links."""
    if not linked:
        monkeypatch.setattr(os, "link", Mock(side_effect=OSError(errno.EPERM, "no links here")))
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    assert checkpoints.resume(ALONE) == (None, {}, [])
    for step, best in ((1, True), (1, True), (2, False), (3, True), (4, False), (5, False)):
        checkpoints.save(state_of(step, best), step)
    checkpoints.wait()
    assert same(torch.load(tmp_path / "c" / "best.pt", weights_only=True), 3)
    names = ["best.pt", "step-00000004.pt", "step-00000005.pt"]
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == names
    assert same(checkpoints.resume(ALONE)[1], 5)


def test_only_leftovers_of_dead_processes_are_removed(tmp_path):
    sleeping = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    # Of a dead process, of none, and of the start before, in a container.
    gone = {f".step-00000001.pt.{number}" for number in (dead.pid, 2**40, os.getpid())}
    kept = {f".step-00000001.pt.{sleeping.pid}", "step-00000001.pt", ".note", ".x.pt.y"}
    for name in gone | kept:
        (tmp_path / name).write_text("half")
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept
    sleeping.communicate()


def test_a_failing_write_names_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(UserError, match=f"^{tmp_path}/a cannot be written .No space left on device.: free"):
        write_atomically(tmp_path / "a", lambda file: file.write(b"a"))


DAMAGE = {
    "cut short": lambda content: content[:-700],
    "empty": lambda _: b"",
    "zeros": lambda content: bytes(len(content)),
    "zeros at its end": lambda content: content[:3000] + bytes(len(content) - 3000),
}


@pytest.mark.parametrize("kind", ["a flipped bit", *DAMAGE])
def test_the_checkpoint_before_a_damaged_one_is_loaded(tmp_path, kind):
    checkpoints = written(tmp_path, 1, 2, 3)
    path = checkpoints.path(3)
    if kind == "a flipped bit":
        flip(path, middle_of_weights(path))
        assert not same(torch.load(path, weights_only=True), 3), "torch does not verify checksums"
    else:
        path.write_bytes(DAMAGE[kind](path.read_bytes()))
    content = path.read_bytes()
    step, state, (note,) = checkpoints.resume(ALONE)
    assert step == 2
    assert same(state, 2)
    assert re.match(f"{path} is damaged .* step-00000003.pt.damaged: resuming from step-00000002.pt$", note)
    assert (tmp_path / "step-00000003.pt.damaged").read_bytes() == content
    assert checkpoints.resume(ALONE)[::2] == (2, [])
    assert same(written(tmp_path, 3, keep=2).resume(ALONE)[1], 3)


def test_a_flipped_bit_anywhere_is_noticed_or_harmless(tmp_path):
    """A flip that is not noticed is in padding."""
    checkpoints = written(tmp_path, 1, 2)
    content, rng, noticed = checkpoints.path(2).read_bytes(), np.random.default_rng(0), 0
    index = range(content.index(b"PK\x01\x02"), len(content), 7)  # zipfile and torch read it differently
    for position in (*rng.integers(0, len(content), 200), *index):
        checkpoints.path(2).write_bytes(content)
        flip(checkpoints.path(2), int(position))
        step, state, _ = checkpoints.resume(ALONE)
        assert same(state, step)
        noticed += step == 1
    assert noticed > 150


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), MemoryError()])
@pytest.mark.parametrize("place", [(zipfile, "_EndRecData"), (zipfile.ZipFile, "testzip"), (torch, "load")])
def test_a_failing_disk_renames_nothing(tmp_path, monkeypatch, error, place):
    checkpoints = written(tmp_path, 1, 2)
    monkeypatch.setattr(*place, Mock(side_effect=error))
    with pytest.raises(UserError, match=r"step-00000002\.pt cannot be read \(.*[Ee]rror\): make it readable"):
        checkpoints.resume(ALONE)
    assert checkpoints.steps() == [1, 2]


def test_a_run_survives_a_full_disk_and_a_damaged_checkpoint(recipe, monkeypatch, capsys):
    """From the eighth update on, no file may exceed 100 kB, which is less than a checkpoint."""
    update, limits = train.update, resource.getrlimit(resource.RLIMIT_FSIZE)
    whole = recipe(*OPTIONS, name="whole")

    def fill_up(run, *rest):
        if run.state.step == 7:
            run.checkpoints.wait()  # for that of the sixth update
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        return update(run, *rest)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(train, "update", fill_up)
        try:
            folder = recipe(*OPTIONS, expect=2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fastalign: ")
    for part in ("08.pt could not be written (File too large)", "step-00000006.pt", "free some space"):
        assert part in line
    names = ["best.pt", "step-00000005.pt", "step-00000006.pt"]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == names
    assert torch.load(folder / "checkpoints" / "best.pt", weights_only=True)["step"] == 5
    newest = folder / "checkpoints" / names[-1]
    flip(newest, middle_of_weights(newest))
    recipe(*OPTIONS)
    assert "resuming from step-00000005.pt" in capsys.readouterr().out
    assert newest.with_name("step-00000006.pt.damaged").exists()
    assert losses(folder) == losses(whole)
    assert_same(checkpoint(folder)["student"], checkpoint(whole)["student"])
    assert (folder / "backbone.json").read_text() == (whole / "backbone.json").read_text()


def test_if_all_checkpoints_are_damaged_none_is_renamed(tmp_path):
    checkpoints = written(tmp_path, 1, 2)
    for step in (1, 2):
        checkpoints.path(step).write_bytes(b"half")
    with pytest.raises(
        UserError, match=r"step-00000002.pt cannot be read .*nor can earlier ones.* start over"
    ):
        checkpoints.resume(ALONE)
    assert checkpoints.steps() == [1, 2]


def test_a_run_folder_takes_one_process_at_a_time(recipe, capsys):
    folder = recipe("max_steps=1")
    with lock_folder(folder):
        recipe("max_steps=2", expect=2)
        assert f"{folder} is in use" in capsys.readouterr().err
    recipe("max_steps=2")
