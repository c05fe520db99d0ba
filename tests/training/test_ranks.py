"""The command under torchrun: two ranks have the losses of one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.run_helpers import losses, metrics, weights

ROOT = Path(__file__).parents[2]


def torchrun(tmp_path, *overrides, program=("-m", "fastalign.train")):
    """The recipe on two ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [*program, str(tmp_path / "recipe.yaml"), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
def test_two_ranks_under_torchrun_have_the_losses_of_one(recipe, tmp_path):
    alone = recipe(name="alone")
    folder, parts = tmp_path / "two", tmp_path / "parts"
    for options in ([f"output={folder}"], [f"output={parts}", "max_steps=4"], [f"output={parts}"]):
        result = torchrun(tmp_path, *options)
        assert result.returncode == 0, result.stderr
    assert losses(parts) == losses(folder), "resumed on two ranks: the same bits"
    ours, theirs = weights(parts), weights(folder)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert losses(folder) == pytest.approx(losses(alone), rel=1e-4)
    ours, theirs = metrics(folder)[1], metrics(alone)[1]
    assert ours[-1]["val_loss"] == pytest.approx(theirs[-1]["val_loss"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["true", "blocks"])
def test_two_compiled_ranks_have_the_losses_of_one(recipe, tmp_path, setting):
    """With accumulation and gradient checkpointing, over an epoch's end; compiled as by the fixture `capturing`."""
    options = ["optim.accumulate=2", "efficiency.grad_checkpointing=true", "max_steps=6", "data.val=null"]
    alone = recipe(*options, name="alone")
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\nfrom fastalign import MaskEmbed, train\nwhole = MaskEmbed.compile\n"
        "MaskEmbed.compile = lambda *a, **k: whole(*a, **k, backend='aot_eager')\nsys.exit(train.main())\n"
    )
    two = tmp_path / "two"
    options += [f"output={two}", f"efficiency.compile={setting}"]
    result = torchrun(tmp_path, *options, program=[str(program)])
    assert result.returncode == 0, result.stderr
    assert losses(two) == pytest.approx(losses(alone), rel=1e-4)
    assert "compile_seconds" in metrics(two)[0][0]
    assert not any("compile_seconds" in line for line in metrics(two)[0][1:])


@pytest.mark.slow
def test_two_ranks_with_an_fp8_teacher(recipe, tmp_path):
    """Its FP8 and bf16 weights are sent from rank to rank at the start, like all others."""
    options = ["efficiency.precision=fp8", "max_steps=2"]
    alone = losses(recipe(*options, name="alone"))
    result = torchrun(tmp_path, *options, f"output={tmp_path / 'two'}")
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "two") == pytest.approx(alone, rel=0.01)


@pytest.mark.slow
def test_two_ranks_and_a_validation_set_for_one(recipe, tmp_path):
    """The second rank has nothing to validate, and must not be left behind; nor may a bad data set be told twice."""
    recipe("max_steps=1")
    folder = tmp_path / "two"
    result = torchrun(tmp_path, f"output={folder}", "data.val=synthetic:3", "max_steps=1")
    assert result.returncode == 0, result.stderr
    assert len(metrics(folder)[1]) == 2
    result = torchrun(tmp_path, f"output={tmp_path / 'bad'}", "data.train=/no/such/folder")
    assert result.returncode != 0
    assert result.stderr.count("fastalign:") == 1
    assert "no such folder: /no/such/folder" in result.stderr


@pytest.mark.slow
def test_the_command_exits_with_2(tmp_path, recipe):
    recipe("max_steps=1")
    command = [sys.executable, "-m", "fastalign.train", str(tmp_path / "recipe.yaml"), "data.train=/no/such"]
    result = subprocess.run(
        [*command, f"output={tmp_path / 'x'}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
