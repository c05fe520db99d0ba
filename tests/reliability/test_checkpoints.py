"""The writer of checkpoints, with full disks, closed folders, kills and bits that flip."""

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fastalign.training import checkpoint
from fastalign.training.checkpoint import Checkpoints, snapshot
from fastalign.training.distributed import World
from fastalign.training.optim import MovingAverage
from fastalign.utils import files
from fastalign.utils.errors import UserError

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
    opened, write = threading.Event(), checkpoint.write_atomically

    def slow(path, content):
        assert opened.wait(30)
        write(path, content)

    monkeypatch.setattr(checkpoint, "write_atomically", slow)
    yield opened
    opened.set()


def test_what_changes_after_save_does_not_reach_the_file(tmp_path, gate):
    module = torch.nn.Linear(5, 3)
    optimizer, average = (
        torch.optim.AdamW(module.parameters(), lr=0.1, fused=True),
        MovingAverage(module, 0.5),
    )

    def step():
        module(torch.ones(2, 5)).square().sum().backward()
        optimizer.step()
        average.update()

    step()
    plain = {"steps": [1, 2], "nested": {"x": (1, None, "text")}}
    state = {"m": module.state_dict(), "o": optimizer.state_dict(), "a": average.state, "plain": plain}
    # An independent copy: through NumPy and lists.
    wanted = {name: np.array(value) for name, value in module.state_dict().items()}
    moments = [value["exp_avg"].tolist() for value in optimizer.state_dict()["state"].values()]
    averaged, rate = average.state["weight"].tolist(), optimizer.param_groups[0]["lr"]
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(state, 1)
    step()
    optimizer.param_groups[0]["lr"] = 7.0
    plain["steps"].append(3)
    plain["nested"]["x"] = "other"
    assert not np.array_equal(module.weight.detach().numpy(), wanted["weight"])
    gate.set()
    checkpoints.wait()
    found = checkpoints.load(1)
    for name, value in wanted.items():
        assert np.array_equal(found["m"][name].numpy(), value)
    assert [value["exp_avg"].tolist() for value in found["o"]["state"].values()] == moments
    assert [value["step"].item() for value in found["o"]["state"].values()] == [1.0, 1.0]
    assert found["a"]["weight"].tolist() == averaged
    assert found["o"]["param_groups"][0]["lr"] == rate
    assert found["plain"] == {"steps": [1, 2], "nested": {"x": (1, None, "text")}}


def test_save_does_not_wait_for_the_disk_but_for_the_save_before(tmp_path, gate):
    checkpoints = Checkpoints(tmp_path, keep=5)
    checkpoints.save(state_of(1), 1)  # returns, with the disk standing still
    assert checkpoints.steps() == []
    second = threading.Thread(target=checkpoints.save, args=(state_of(2), 2))
    second.start()
    second.join(0.3)
    assert second.is_alive(), "the write before is not finished"
    assert sum(thread.name == "checkpoint" for thread in threading.enumerate()) == 1
    gate.set()
    second.join(30)
    assert checkpoints.steps()[0] == 1
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2]


@pytest.mark.parametrize("later", ["save", "wait"])
def test_a_full_disk_is_told_once_and_costs_nothing(tmp_path, later):
    """The kernel's own ENOSPC: the temporary file is a link to /dev/full."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(state_of(1), 1, best=True)
    checkpoints.wait()
    (tmp_path / f".step-00000002.pt.{os.getpid()}").symlink_to("/dev/full")
    checkpoints.save(state_of(2), 2, best=True)
    with pytest.raises(UserError) as caught:
        checkpoints.save(state_of(3), 3) if later == "save" else checkpoints.wait()
    line = str(caught.value)
    assert "\n" not in line
    for part in (
        "step-00000002.pt",
        "No space left on device",
        f"{tmp_path / 'step-00000001.pt'}",
        "free some space",
    ):
        assert part in line
    checkpoints.wait()  # told
    assert not checkpoints.failed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "step-00000001.pt"]
    assert checkpoints.choose() == (1, [])
    assert same(checkpoints.load(1), 1)
    assert same(torch.load(tmp_path / "best.pt", weights_only=True), 1)
    written(tmp_path, 3, keep=1)
    assert checkpoints.steps() == [3], "with room again, as ever"


def test_an_error_of_the_disk_while_flushing(tmp_path, monkeypatch):
    checkpoints = written(tmp_path, 1)

    def fail(handle):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    checkpoints.save(state_of(2), 2)
    with pytest.raises(
        UserError, match=r"step-00000002\.pt could not be written \(Input/output error\).*see that the"
    ):
        checkpoints.wait()
    assert checkpoints.steps() == [1]


def test_a_file_in_the_folders_place(tmp_path):
    (tmp_path / "checkpoints").write_text("mine")
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(state_of(1), 1)
    with pytest.raises(
        UserError, match=r"step-00000001\.pt could not be written .*there is none yet: make .*written"
    ):
        checkpoints.wait()
    assert (tmp_path / "checkpoints").read_text() == "mine"


def script(code: str, *arguments) -> subprocess.CompletedProcess:
    """Python of its own, on one thread."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )


CLOSED = """
import os, sys, torch
from pathlib import Path
from fastalign.training.checkpoint import Checkpoints
from fastalign.utils.errors import UserError
folder = Path(sys.argv[1])
checkpoints = Checkpoints(folder, keep=1)
if os.getuid() == 0:
    folder.parent.chmod(0o755)
    os.chown(folder, 65534, 65534)
    os.setuid(65534)
checkpoints.save({"step": 1}, 1)
checkpoints.wait()
folder.chmod(0o555)
checkpoints.save({"step": 2}, 2)
try:
    checkpoints.wait()
except UserError as error:
    print(error)
print(os.listdir(folder), checkpoints.load(checkpoints.choose()[0]))
"""


def test_a_folder_that_becomes_read_only(tmp_path):
    """Not as root, whom no mode stops."""
    folder = Path("/tmp") / f"fastalign-read-only-{os.getpid()}"  # pytest's folders are its user's alone
    folder.mkdir()
    try:
        result = script(CLOSED, folder)
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)
    assert result.returncode == 0, result.stderr
    line, left = result.stdout.splitlines()
    assert "step-00000002.pt could not be written (Permission denied)" in line
    assert "step-00000001.pt" in line
    assert left == "['step-00000001.pt'] {'step': 1}"


KILLED = """
import json, os, signal, sys, torch
from pathlib import Path
from fastalign.training import checkpoint
from fastalign.utils import files
from fastalign.training.checkpoint import Checkpoints
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


def test_a_writer_killed_at_any_moment_leaves_what_loads(tmp_path):
    """SIGKILL after so many bytes of the file, before they are flushed, and after each rename."""
    result = script(KILLED, tmp_path)
    assert result.returncode == 0, result.stderr
    for number, (moment, status, names, child) in enumerate(json.loads(result.stdout)):
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
        state = checkpoints.load(checkpoints.choose()[0])
        assert state["step"] == (2 if complete else 1)
        assert torch.equal(state["x"], torch.full((200_000,), float(state["step"])))


def test_only_leftovers_of_the_dead_are_removed(tmp_path):
    sleeping = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = {f".step-00000001.pt.{dead.pid}", f".best.pt.{dead.pid}", f".step-00000001.pt.{2**40}"}
    names.add(f".step-00000002.pt.{os.getpid()}")  # of the start before, in a container
    kept = {
        f".step-00000001.pt.{sleeping.pid}",
        "step-00000001.pt",
        ".note",
        ".x.pt.y",
    }
    for name in names | kept:
        (tmp_path / name).write_text("half")
    (tmp_path / f".timm.{dead.pid}").mkdir()
    (tmp_path / f".timm.{dead.pid}" / "model.safetensors").write_text("half")  # of an export
    Checkpoints(tmp_path, keep=1).clean()
    assert {path.name for path in tmp_path.iterdir()} == kept
    sleeping.communicate()


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


def middle_of_weights(path: Path) -> int:
    """A byte among the numbers of the largest tensor."""
    with zipfile.ZipFile(path) as file:
        part = max(file.infolist(), key=lambda each: each.file_size)
    # Its header has 30 bytes and two fields of variable length before the content.
    header = path.read_bytes()[part.header_offset : part.header_offset + 30]
    lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return part.header_offset + 30 + lengths + part.file_size // 2


DAMAGES = {
    "a bit flips": lambda path: flip(path, middle_of_weights(path)),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-700]),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "its end is zeros": lambda path: path.write_bytes(
        path.read_bytes()[:3000] + bytes(path.stat().st_size - 3000)
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_newest_gives_way_to_the_one_before(tmp_path, kind):
    checkpoints = written(tmp_path, 1, 2, 3)
    DAMAGES[kind](checkpoints.path(3))
    if kind == "a bit flips":  # which torch itself does not notice
        assert not same(torch.load(checkpoints.path(3), weights_only=True), 3)
    content = checkpoints.path(3).read_bytes()
    step, state, notes = checkpoints.resume(World(0, 1, torch.device("cpu")))
    assert step == 2
    assert same(state, 2)
    assert len(notes) == 1
    for part in (str(checkpoints.path(3)), "is damaged", "step-00000003.pt.damaged", "step-00000002.pt"):
        assert part in notes[0]
    assert "\n" not in notes[0]
    assert (tmp_path / "step-00000003.pt.damaged").read_bytes() == content, "kept aside"
    assert checkpoints.choose() == (2, []), "said once"
    checkpoints = written(tmp_path, 3, keep=2)
    assert checkpoints.steps() == [2, 3]
    assert checkpoints.choose() == (3, [])
    assert same(checkpoints.load(3), 3)


def test_a_flipped_bit_anywhere_is_noticed_or_harmless(tmp_path):
    """Most places are among the numbers; what is not noticed lies in padding, and the state is right."""
    checkpoints = written(tmp_path, 1, 2)
    content, rng, noticed = checkpoints.path(2).read_bytes(), np.random.default_rng(0), 0
    index = range(
        content.index(b"PK\x01\x02"), len(content), 7
    )  # which zipfile and torch read each their own way
    for position in (*rng.integers(0, len(content), 200), *index):
        checkpoints.path(2).write_bytes(content)
        flip(checkpoints.path(2), int(position))
        step, _ = checkpoints.choose()
        assert same(checkpoints.load(step), step)
        noticed += step == 1
    assert noticed > 150


def test_want_of_descriptors_is_no_damage(tmp_path):
    """With none left zipfile cannot open the file; with one, torch cannot map it."""
    checkpoints = written(tmp_path, 1, 2)
    checkpoints.choose()  # imports what it needs
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for spare in (0, 1):
        free = os.dup(0)
        os.close(free)  # the lowest number that is free, and all above it
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + spare, hard))
        try:
            reason = files.damage(checkpoints.path(2))
        except UserError as error:
            reason = error
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert isinstance(reason, UserError), reason
        assert re.fullmatch(
            r".*step-00000002\.pt cannot be read \(.*Too many open files.*\): see .*", str(reason)
        )


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), MemoryError()])
@pytest.mark.parametrize("place", [(zipfile, "_EndRecData"), (zipfile.ZipFile, "testzip"), (torch, "load")])
def test_a_disk_that_fails_renames_nothing(tmp_path, monkeypatch, error, place):
    def fail(*_, **__):
        raise error

    checkpoints = written(tmp_path, 1, 2)
    monkeypatch.setattr(*place, fail)
    with pytest.raises(UserError, match=r"step-00000002\.pt cannot be read \(.*[Ee]rror\): see that"):
        checkpoints.choose()
    assert checkpoints.steps() == [1, 2]


def test_where_all_are_damaged_none_is_moved(tmp_path):
    checkpoints = written(tmp_path, 1, 2)
    for step in (1, 2):
        flip(checkpoints.path(step), middle_of_weights(checkpoints.path(step)))
    with pytest.raises(
        UserError, match=r"step-00000002\.pt cannot be read .*nor can the 1 before it: .*remove"
    ):
        checkpoints.choose()
    assert checkpoints.steps() == [1, 2]


def test_a_checkpoint_never_runs_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"step": Evil()}, tmp_path / "step-00000001.pt")
    checkpoints = Checkpoints(tmp_path, keep=1)
    with pytest.raises(UserError, match=r"step-00000001\.pt cannot be read"):
        checkpoints.load(checkpoints.choose()[0])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("linked", [True, False])
def test_the_best_outlives_its_step(tmp_path, monkeypatch, linked):
    """Also on a file system without links."""
    if not linked:

        def refuse(*_):
            raise OSError(errno.EPERM, "no links here")

        monkeypatch.setattr(os, "link", refuse)
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step, best in ((1, True), (1, True), (2, False), (3, True), (4, False)):
        checkpoints.save(state_of(step), step, best=best)
    checkpoints.wait()
    assert same(torch.load(tmp_path / "best.pt", weights_only=True), 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "step-00000004.pt"]


def test_a_snapshot_keeps_values_types_and_shapes():
    tree = {
        "half": torch.arange(6).reshape(2, 3).bfloat16().t(),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "none": None,
        "list": [torch.ones(0), (True, 1.5)],
    }
    found = snapshot(tree)
    assert found["half"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert (found["half"].dtype, found["scalar"].dtype, found["scalar"].shape) == (
        torch.bfloat16,
        torch.int64,
        (),
    )
    assert found["none"] is None
    assert found["list"][1] == (True, 1.5)
    assert found["list"][0].shape == (0,)


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
