"""A run whose disk fills up or whose newest checkpoint is damaged resumes with the same bits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.run_helpers import flip, losses, middle_of_weights, weights

ROOT = Path(__file__).parents[2]
OPTIONS = ["optim.ema=0.9", "checkpoint.every_steps=2"]


def same_run(found: Path, wanted: Path) -> bool:
    """Losses and last weights, bit for bit, and the backbone's facts."""
    ours, theirs = weights(found), weights(wanted)
    same = losses(found) == losses(wanted) and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    return same and (found / "backbone.json").read_text() == (wanted / "backbone.json").read_text()


# A checkpoint is longer than 100 kB: none can be written from the fourth update on.
FULL = """
import resource, sys
from fastalign import train
keep = train.update
def update(run, *rest):
    if run.state.step == 3:
        run.checkpoints.wait()  # that of the second update is good
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    return keep(run, *rest)
train.update = update
sys.exit(train.main(sys.argv[1:]))
"""


def test_a_disk_that_fills_up_ends_the_run_in_one_line(recipe, tmp_path):
    whole, run = recipe(*OPTIONS, name="whole"), tmp_path / "run"
    result = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "recipe.yaml"), *OPTIONS, f"output={run}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert result.returncode == 2, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("fastalign:")]
    for part in (
        "step-00000004.pt could not be written (File too large)",
        "step-00000002.pt",
        "free some space",
    ):
        assert part in line
    assert "Traceback" not in result.stderr
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002.pt"]
    assert same_run(recipe(*OPTIONS), whole)


def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(recipe, capsys):
    whole = recipe(*OPTIONS, name="whole")
    folder = recipe(*OPTIONS, "max_steps=8")
    newest = folder / "checkpoints" / "step-00000008.pt"
    flip(newest, middle_of_weights(newest))
    capsys.readouterr()
    assert same_run(recipe(*OPTIONS), whole)
    assert "resuming from step-00000006.pt" in capsys.readouterr().out
    assert (folder / "checkpoints" / "step-00000008.pt.damaged").exists()


@pytest.mark.parametrize("content", [b"half", b""])
def test_a_run_without_an_undamaged_checkpoint_is_refused(recipe, capsys, content):
    folder = recipe("max_steps=2")
    (folder / "checkpoints" / "step-00000002.pt").write_bytes(content)
    capsys.readouterr()
    recipe(expect=2)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastalign:")]
    assert "step-00000002.pt cannot be read" in line
    assert "start over" in line
