"""The command under torchrun: two ranks have the losses of one."""

import pytest

from tests.run_helpers import losses, torchrun


def train_on_two(tmp_path, *overrides, program=("-m", "fastalign.train"), expect=0) -> str:
    """Run the recipe on two ranks. Returns stderr."""
    return torchrun(*program, tmp_path / "recipe.yaml", *overrides, expect=expect)


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["true", "blocks"])
def test_two_compiled_ranks_have_the_losses_of_one(recipe, tmp_path, setting):
    """With accumulation and gradient checkpointing, beyond the end of an epoch; compiled with `aot_eager`."""
    options = ["optim.accumulate=2", "efficiency.grad_checkpointing=true", "max_steps=6", "data.val=null"]
    alone = recipe(*options, name="alone")
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\nfrom fastalign import MaskEmbed, train\nwhole = MaskEmbed.compile\n"
        "MaskEmbed.compile = lambda *a, **k: whole(*a, **k, backend='aot_eager')\nsys.exit(train.main())\n"
    )
    two = tmp_path / "two"
    train_on_two(tmp_path, *options, f"output={two}", f"efficiency.compile={setting}", program=[program])
    assert losses(two) == pytest.approx(losses(alone), rel=1e-4)


@pytest.mark.slow
def test_two_ranks_with_an_fp8_teacher_have_the_losses_of_one(recipe, tmp_path):
    """The validation set has images for one rank only."""
    options = ["efficiency.precision=fp8", "max_steps=2", "data.val=synthetic:3"]
    alone, two = recipe(*options, name="alone"), tmp_path / "two"
    train_on_two(tmp_path, *options, f"output={two}")
    assert losses(two) == pytest.approx(losses(alone), rel=0.01)
    assert len(losses(two, "val_loss")) == 2
    assert losses(two, "val_loss") == pytest.approx(losses(alone, "val_loss"), rel=0.01)


@pytest.mark.slow
def test_bad_input_is_one_line_for_all_ranks_and_exit_code_2(recipe, tmp_path):
    recipe("max_steps=1")
    text = train_on_two(tmp_path, f"output={tmp_path / 'bad'}", "data.train=/no/such/folder", expect=1)
    (line,) = (line for line in text.splitlines() if line.startswith("fastalign:"))
    assert "no such folder: /no/such/folder" in line
    assert "exitcode  : 2 " in text
