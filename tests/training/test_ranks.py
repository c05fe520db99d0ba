"""The command under torchrun: two ranks have the losses of one."""

import pytest
import torch

from tests.run_helpers import losses, metrics, start_torchrun, torchrun, weights


def train_on_two(tmp_path, *overrides, program=("-m", "fastalign.train")) -> None:
    torchrun(*program, tmp_path / "recipe.yaml", *overrides)


@pytest.mark.slow
def test_two_ranks_under_torchrun_have_the_losses_of_one(recipe, tmp_path):
    alone = recipe(name="alone")
    folder, parts = tmp_path / "two", tmp_path / "parts"
    for options in ([f"output={folder}"], [f"output={parts}", "max_steps=4"], [f"output={parts}"]):
        train_on_two(tmp_path, *options)
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
    train_on_two(tmp_path, *options, program=[program])
    assert losses(two) == pytest.approx(losses(alone), rel=1e-4)
    assert "compile_seconds" in metrics(two)[0][0]
    assert not any("compile_seconds" in line for line in metrics(two)[0][1:])


@pytest.mark.slow
def test_two_ranks_with_an_fp8_teacher(recipe, tmp_path):
    """Its FP8 and bf16 weights are sent from rank to rank at the start, like all others."""
    options = ["efficiency.precision=fp8", "max_steps=2"]
    alone = losses(recipe(*options, name="alone"))
    train_on_two(tmp_path, *options, f"output={tmp_path / 'two'}")
    assert losses(tmp_path / "two") == pytest.approx(alone, rel=0.01)


@pytest.mark.slow
def test_two_ranks_and_a_validation_set_for_one(recipe, tmp_path):
    """The second rank has nothing to validate and must still take part; a bad data set is reported once."""
    recipe("max_steps=1")
    folder = tmp_path / "two"
    train_on_two(tmp_path, f"output={folder}", "data.val=synthetic:3", "max_steps=1")
    assert len(metrics(folder)[1]) == 2
    options = [f"output={tmp_path / 'bad'}", "data.train=/no/such/folder"]
    result = start_torchrun("-m", "fastalign.train", tmp_path / "recipe.yaml", *options)
    assert result.returncode != 0
    assert result.stderr.count("fastalign:") == 1
    assert "no such folder: /no/such/folder" in result.stderr
