"""A run whose disk fails, whose writer is killed, whose newest checkpoint is damaged: on with the same bits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from fastalign import train
from tests.run_helpers import flip, middle_of_weights

ROOT = Path(__file__).parents[2]
SIZES = {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3}
TREE = {
    "student": {"name": "vit_tiny_patch16_224", "weights": "random", "kwargs": SIZES},
    "data": {"train": "synthetic:40", "val": "synthetic:8", "threads": 1},
    "optim": {"batch_size": 8, "epochs": 2, "lr": 1e-3, "ema": 0.9},
    "checkpoint": {"every_steps": 2},
    "efficiency": {"precision": "fp32"},
}


@pytest.fixture
def recipe(tmp_path):
    """Runs the command in this process; returns the run folder."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(TREE))

    def run(name, *overrides, expect=0) -> Path:
        assert train.main([str(path), f"output={tmp_path / name}", *overrides]) == expect
        return tmp_path / name

    return run


def broken(tmp_path: Path, code: str, name: str) -> subprocess.CompletedProcess:
    """The command in a process of its own, with something broken by `code`."""
    program = (
        f"import os, signal, sys\nfrom fastalign import train\n{code}\nsys.exit(train.main(sys.argv[1:]))"
    )
    return subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "recipe.yaml"), f"output={tmp_path / name}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},  # bits depend on it
        check=False,
    )


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def assert_same(found: Path, wanted: Path) -> None:
    """Losses, the last checkpoint, the best one and the backbone, bit for bit."""
    assert losses(found) == losses(wanted)
    for name in (max(path.name for path in (wanted / "checkpoints").glob("step-*")), "best.pt"):
        ours, theirs = (torch.load(f / "checkpoints" / name, weights_only=True) for f in (found, wanted))
        assert ours["step"] == theirs["step"]
        for part in ("student", "average"):
            assert all(torch.equal(ours[part][key], value) for key, value in theirs[part].items())
    ours, theirs = (load_file(folder / "backbone.safetensors") for folder in (found, wanted))
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    assert (found / "backbone.json").read_text() == (wanted / "backbone.json").read_text()


# The largest file is about 1 MB: from the fourth update on, none may be longer than 100 kB.
FULL = """
import resource
keep = train.update
def update(run, *rest):
    if run.state.step == 3:
        run.checkpoints.wait()  # that of the second update is good
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    return keep(run, *rest)
train.update = update
"""


def test_a_disk_that_fills_up_ends_the_run_in_one_line(recipe, tmp_path):
    whole = recipe("whole")
    result = broken(tmp_path, FULL, "run")
    assert result.returncode == 2, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("fastalign:")]
    for part in (
        "step-00000004.pt could not be written (File too large)",
        "step-00000002.pt",
        "free some space",
    ):
        assert part in line
    assert "Traceback" not in result.stderr
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002.pt"]
    assert_same(recipe("run"), whole)


# In the write of step 5, the first that is the best: before best.pt, before the backbone, and between its two files.
KILLS = {
    "before the best": "checkpoint_files.Checkpoints.make_best = die",
    "before the backbone": "checkpoint.publish_backbone = die",
    "between its files": "once = checkpoint.write_atomically\n"
    "checkpoint.write_atomically = lambda *a: die() if a[0].name == 'backbone.json' else once(*a)",
}
DIE = """
from fastalign.training import checkpoint, checkpoint_files
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("moment", KILLS)
def test_what_a_killed_writer_left_undone_is_done_at_the_next_start(recipe, tmp_path, moment):
    """Also where nothing is trained any more."""
    wanted = recipe("wanted", "max_steps=5")
    result = broken(tmp_path, DIE + KILLS[moment], "run")
    assert result.returncode == -9
    folder = tmp_path / "run"
    assert not (folder / "backbone.json").exists()
    assert (folder / "backbone.safetensors").exists() == (moment == "between its files")
    found = recipe("run", "max_steps=5")
    assert_same(found, wanted)
    with safe_open(found / "backbone.safetensors", "pt") as file:
        assert file.metadata()["facts"] == (found / "backbone.json").read_text()
    assert json.loads((found / "backbone.json").read_text())["step"] == 5


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(recipe, capsys):
    whole = recipe("whole")
    folder = recipe("run", "max_steps=8")
    newest = folder / "checkpoints" / "step-00000008.pt"
    flip(newest, middle_of_weights(newest))
    capsys.readouterr()
    assert_same(recipe("run"), whole)
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if "damaged" in line]
    assert "resuming from step-00000006.pt" in line.replace("\n", " ")
    assert (folder / "checkpoints" / "step-00000008.pt.damaged").exists()


def test_a_run_without_an_undamaged_checkpoint_is_refused(recipe, capsys):
    folder = recipe("run", "max_steps=2")
    (folder / "checkpoints" / "step-00000002.pt").write_bytes(b"half")
    capsys.readouterr()
    recipe("run", expect=2)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastalign:")]
    assert "step-00000002.pt cannot be read" in line
    assert "start over" in line
