"""Checkpoint files with full disks, closed directories, kills and flipped bits."""

import errno
import json
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fastalign.training import checkpoint_files
from fastalign.training.checkpoint_files import Checkpoints, snapshot
from fastalign.training.distributed import World
from fastalign.training.optim import MovingAverage
from fastalign.utils.errors import UserError
from tests.run_helpers import flip, middle_of_weights

ROOT = Path(__file__).parents[2]


def state_of(step: int) -> dict:
    """Different tensors for each step, by a rule that the test can repeat."""
    generator = torch.Generator().manual_seed(step)
    return {
        "step": step,
        "weights": {"a": torch.randn(1000, generator=generator), "b": torch.full((3,), step)},
    }


def same(found: dict, step: int) -> bool:
    wanted = state_of(step)
    return found["step"] == step and all(
        torch.equal(found["weights"][name], value) for name, value in wanted["weights"].items()
    )


def written(folder: Path, *steps: int, keep: int = 9) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep=keep)
    for step in steps:
        checkpoints.save(state_of(step), step)
    checkpoints.wait()
    return checkpoints


@pytest.fixture
def gate(monkeypatch):
    """A disk that takes as long as the test wants."""
    opened, write = threading.Event(), checkpoint_files.write_atomically

    def slow(path, content):
        assert opened.wait(30)
        write(path, content)

    monkeypatch.setattr(checkpoint_files, "write_atomically", slow)
    yield opened
    opened.set()


def test_a_snapshot_is_independent_of_what_training_does_next(tmp_path, gate):
    module = torch.nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
    average = MovingAverage(module, 0.5)

    def step():
        module(torch.ones(2, 5)).square().sum().backward()
        optimizer.step()
        average.update()

    step()
    plain = {"steps": [1, 2], "nested": {"x": (1, None, "text")}}
    half = torch.arange(6).reshape(2, 3).bfloat16().t()
    state = {"m": module.state_dict(), "o": optimizer.state_dict(), "a": average.state, "plain": plain}
    # An independent copy: through NumPy and lists.
    wanted = {name: np.array(value) for name, value in module.state_dict().items()}
    moments = [value["exp_avg"].tolist() for value in optimizer.state_dict()["state"].values()]
    averaged, rate = average.state["weight"].tolist(), optimizer.param_groups[0]["lr"]
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(snapshot({**state, "half": half, "empty": torch.ones(0)}), 1)
    step()
    optimizer.param_groups[0]["lr"] = 7.0
    plain["steps"].append(3)
    plain["nested"]["x"] = "other"
    assert not np.array_equal(module.weight.detach().numpy(), wanted["weight"])
    gate.set()
    checkpoints.wait()
    _, found, _ = checkpoints.load()
    for name, value in wanted.items():
        assert np.array_equal(found["m"][name].numpy(), value)
    assert [value["exp_avg"].tolist() for value in found["o"]["state"].values()] == moments
    assert [value["step"].item() for value in found["o"]["state"].values()] == [1.0, 1.0]
    assert found["a"]["weight"].tolist() == averaged
    assert found["o"]["param_groups"][0]["lr"] == rate
    assert found["plain"] == {"steps": [1, 2], "nested": {"x": (1, None, "text")}}
    assert found["half"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert (found["half"].dtype, found["empty"].shape) == (torch.bfloat16, (0,))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_snapshot_of_a_gpu_is_taken_at_once():
    """Work that is queued behind it does not reach it; work queued before it does."""
    value = torch.zeros(2**24, device="cuda")
    for _ in range(20):
        value += 1
    found = snapshot({"value": value})["value"]
    value += 1
    assert found.is_pinned()
    assert torch.equal(found, torch.full((2**24,), 20.0))


def test_save_waits_for_the_previous_save_only(tmp_path, gate):
    checkpoints = Checkpoints(tmp_path, keep=5)
    checkpoints.save(state_of(1), 1)  # returns although the disk stands still
    assert checkpoints.steps() == []
    second = threading.Thread(target=checkpoints.save, args=(state_of(2), 2))
    second.start()
    second.join(0.3)
    assert second.is_alive(), "the previous write is not finished"
    assert sum(thread.name == "checkpoint" for thread in threading.enumerate()) == 1
    gate.set()
    second.join(30)
    assert checkpoints.steps()[0] == 1
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2]


@pytest.mark.parametrize("linked", [True, False])
def test_the_newest_and_the_best_are_kept(tmp_path, monkeypatch, linked):
    """Also on a file system without hard links."""
    if not linked:

        def refuse(*_):
            raise OSError(errno.EPERM, "no links here")

        monkeypatch.setattr(os, "link", refuse)
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    assert checkpoints.load() == (None, {}, [])
    for step, best in ((1, True), (1, True), (2, False), (3, True), (4, False), (5, False)):
        checkpoints.save(state_of(step), step, best=best)
    checkpoints.wait()
    assert same(torch.load(tmp_path / "c" / "best.pt", weights_only=True), 3)
    names = ["best.pt", "step-00000004.pt", "step-00000005.pt"]
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == names
    assert same(checkpoints.load()[1], 5)


@pytest.mark.parametrize("later", ["save", "wait"])
def test_a_full_disk_is_reported_once_and_costs_nothing(tmp_path, later):
    """The kernel's own ENOSPC: the temporary file is a link to /dev/full."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(state_of(1), 1, best=True)
    checkpoints.wait()
    (tmp_path / f".step-00000002.pt.{os.getpid()}").symlink_to("/dev/full")
    checkpoints.save(state_of(2), 2, best=True)
    with pytest.raises(UserError) as caught:
        checkpoints.save(state_of(3), 3) if later == "save" else checkpoints.wait()
    for part in (
        "step-00000002.pt",
        "No space left on device",
        f"{tmp_path / 'step-00000001.pt'}",
        "free some",
    ):
        assert part in str(caught.value)
    checkpoints.wait()  # reported already
    assert not checkpoints.failed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "step-00000001.pt"]
    step, state, notes = checkpoints.load()
    assert (step, notes) == (1, [])
    assert same(state, 1)
    assert same(torch.load(tmp_path / "best.pt", weights_only=True), 1)
    assert written(tmp_path, 3, keep=1).steps() == [3], "with space again"


KILLED = """
import json, os, signal, sys, torch
from pathlib import Path
from fastalign.utils import files
from fastalign.training.checkpoint_files import Checkpoints
save, fsync, die = torch.save, os.fsync, lambda *a: os.kill(os.getpid(), signal.SIGKILL)

class Mortal:
    def __init__(self, file, at):
        self.file, self.left = file, at
    def write(self, data):
        self.left -= len(data)
        if self.left <= 0:
            self.file.write(bytes(data)[:max(0, len(data) + self.left)])
            self.file.flush()
            die()
        return self.file.write(data)
    def __getattr__(self, name):
        return getattr(self.file, name)

def live(folder, moment):
    checkpoints = Checkpoints(folder, keep=1)
    if moment == "flush":
        os.fsync = die
    elif moment == "best":
        checkpoints.make_best = die
    elif moment == "folder":
        files.flush_folder = die
    else:
        torch.save = lambda state, file: save(state, Mortal(file, moment))
    checkpoints.save({"step": 2, "x": torch.full((200_000,), 2.0)}, 2, best=True)
    checkpoints.wait()

found = []
for number, moment in enumerate([0, 1_000, 400_000, 800_000, "flush", "folder", "best"]):
    folder = Path(sys.argv[1]) / str(number)
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.save({"step": 1, "x": torch.full((200_000,), 1.0)}, 1, best=True)
    checkpoints.wait()
    child = os.fork()
    if not child:
        live(folder, moment)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    found.append([moment, status, sorted(os.listdir(folder)), child])
print(json.dumps(found))
"""


def test_a_writer_killed_at_any_moment_leaves_a_checkpoint_that_loads(tmp_path):
    """SIGKILL after so many bytes of the file, before they are flushed, and after each rename."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    output = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=True).stdout
    for number, (moment, status, names, child) in enumerate(json.loads(output)):
        assert status == 9, "killed, not ended"
        complete = moment in ("folder", "best")
        leftover = f".step-00000002.pt.{child}"
        assert (leftover in names) == (not complete), (moment, names)
        assert "step-00000001.pt" in names, "nothing is removed before the new one is complete"
        folder = tmp_path / str(number)
        assert torch.load(folder / "best.pt", weights_only=True)["step"] == 1
        checkpoints = Checkpoints(folder, keep=1)
        checkpoints.clean()
        assert not (folder / leftover).exists()
        step, state, _ = checkpoints.load()
        assert step == (2 if complete else 1)
        assert torch.equal(state["x"], torch.full((200_000,), float(step)))


def test_only_leftovers_of_dead_processes_are_removed(tmp_path):
    sleeping = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = {f".step-00000001.pt.{dead.pid}", f".best.pt.{dead.pid}", f".step-00000001.pt.{2**40}"}
    names.add(f".step-00000002.pt.{os.getpid()}")  # of the start before, in a container
    kept = {f".step-00000001.pt.{sleeping.pid}", "step-00000001.pt", ".note", ".x.pt.y"}
    for name in names | kept:
        (tmp_path / name).write_text("half")
    (tmp_path / f".timm.{dead.pid}").mkdir()
    (tmp_path / f".timm.{dead.pid}" / "model.safetensors").write_text("half")  # of an export
    Checkpoints(tmp_path, keep=1).clean()
    assert {path.name for path in tmp_path.iterdir()} == kept
    sleeping.communicate()


def damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    if kind == "a flipped bit":
        flip(path, middle_of_weights(path))
        assert not same(torch.load(path, weights_only=True), 3), "torch itself does not notice"
        return
    damaged = {
        "cut short": content[:-700],
        "empty": b"",
        "zeros": bytes(len(content)),
        "zeros at its end": content[:3000] + bytes(len(content) - 3000),
    }
    path.write_bytes(damaged[kind])


@pytest.mark.parametrize("kind", ["a flipped bit", "cut short", "empty", "zeros", "zeros at its end"])
def test_the_checkpoint_before_a_damaged_one_is_loaded(tmp_path, kind):
    checkpoints = written(tmp_path, 1, 2, 3)
    damage(checkpoints.path(3), kind)
    content = checkpoints.path(3).read_bytes()
    step, state, notes = checkpoints.resume(World(0, 1, torch.device("cpu")))
    assert step == 2
    assert same(state, 2)
    assert len(notes) == 1
    for part in (str(checkpoints.path(3)), "is damaged", "step-00000003.pt.damaged", "step-00000002.pt"):
        assert part in notes[0]
    assert "\n" not in notes[0]
    assert (tmp_path / "step-00000003.pt.damaged").read_bytes() == content, "kept"
    step, _, notes = checkpoints.load()
    assert (step, notes) == (2, []), "said once"
    checkpoints = written(tmp_path, 3, keep=2)
    assert checkpoints.steps() == [2, 3]
    step, state, notes = checkpoints.load()
    assert (step, notes) == (3, [])
    assert same(state, 3)


def test_a_flipped_bit_anywhere_is_noticed_or_harmless(tmp_path):
    """Most places are among the numbers; what is not noticed lies in padding, and the state is right."""
    checkpoints = written(tmp_path, 1, 2)
    content, rng, noticed = checkpoints.path(2).read_bytes(), np.random.default_rng(0), 0
    index = range(content.index(b"PK\x01\x02"), len(content), 7)  # zipfile and torch read it differently
    for position in (*rng.integers(0, len(content), 200), *index):
        checkpoints.path(2).write_bytes(content)
        flip(checkpoints.path(2), int(position))
        step, state, _ = checkpoints.load()
        assert same(state, step)
        noticed += step == 1
    assert noticed > 150


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), MemoryError()])
@pytest.mark.parametrize("place", [(zipfile, "_EndRecData"), (zipfile.ZipFile, "testzip"), (torch, "load")])
def test_a_failing_disk_renames_nothing(tmp_path, monkeypatch, error, place):
    def fail(*_, **__):
        raise error

    checkpoints = written(tmp_path, 1, 2)
    monkeypatch.setattr(*place, fail)
    with pytest.raises(UserError, match=r"step-00000002\.pt cannot be read \(.*[Ee]rror\): make it readable"):
        checkpoints.load()
    assert checkpoints.steps() == [1, 2]


def test_if_all_are_damaged_none_is_renamed(tmp_path):
    checkpoints = written(tmp_path, 1, 2)
    for step in (1, 2):
        flip(checkpoints.path(step), middle_of_weights(checkpoints.path(step)))
    with pytest.raises(
        UserError, match=r"step-00000002\.pt cannot be read .*nor can the 1 before it: .*remove"
    ):
        checkpoints.load()
    assert checkpoints.steps() == [1, 2]
