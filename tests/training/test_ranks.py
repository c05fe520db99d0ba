"""The command on two ranks of torchrun has the losses of one; and what ranks do about bad input and a full disk."""

import pytest
import yaml

from fastalign import train
from tests.run_helpers import MODEL, losses, torchrun

BASE = {
    "student": MODEL,
    # Validation batches: three on rank 0, two on rank 1.
    "data": {"train": "synthetic:40", "val": "synthetic:9", "threads": 1},
    "optim": {"batch_size": 8, "epochs": 2, "lr": 1e-3, "ema": 0.9, "accumulate": 2, "clip": 0.5},
    "efficiency": {"grad_checkpointing": True, "precision": "fp32"},
    "log": {"every_steps": 2},
}
VARIANTS = {  # overrides, and how close losses are to those of one process
    "whole": (["efficiency.compile=true", "max_steps=6", "data.val=null"], 1e-4),
    "blocks": (["efficiency.compile=blocks", "max_steps=6", "data.val=null"], 1e-4),
    "mim": (["objective=mim", "teacher.skip_blocks=0", "masks.mode=drop", "max_steps=2"], 1e-4),
    "frozen": (["student.freeze=true", "optim.ema=null", "max_steps=2"], 1e-4),
    "bf16": (["efficiency.precision=bf16", "masks.mode=drop", "max_steps=2"], 0.02),
    "fp8": (["efficiency.precision=fp8", "data.val=synthetic:3", "max_steps=2"], 0.01),  # one rank validates
}
# Several runs on the same two ranks: starting them is what takes long.
PROGRAM = """
import sys, yaml
from pathlib import Path
from fastalign import MaskEmbed
from fastalign.config import load_config
from fastalign.training import distributed
from fastalign.training.checkpoint_files import Checkpoints
from fastalign.utils.errors import SharedError, UserError
from fastalign.train import train

compiled = MaskEmbed.compile
MaskEmbed.compile = lambda *a, **k: compiled(*a, **k, backend="aot_eager")
world, root = distributed.start(), Path(sys.argv[1])
for overrides in yaml.safe_load((root / "runs.yaml").read_text()):
    try:
        train(load_config(root / "recipe.yaml", overrides), world)
    except SharedError as error:
        (root / f"told.{world.rank}").write_text(str(error))
    world.barrier()
place = "whole" if world.main else "elsewhere"
try:
    Checkpoints(root / place / "checkpoints", keep=1).resume(world)
except UserError as error:
    (root / f"unseen.{world.rank}").write_text(str(error))
distributed.stop()
# One of gloo's threads that is alive when Python ends may abort the process.
threads = [task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
(root / f"threads.{world.rank}").write_text(" ".join(threads))
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder of the finished runs of two ranks."""
    root = tmp_path_factory.mktemp("ranks")
    (root / "recipe.yaml").write_text(yaml.safe_dump(BASE))
    (root / "program.py").write_text(PROGRAM)
    (root / "full").mkdir()
    (root / "full" / "checkpoints").write_text("in the way")
    runs = [[*overrides, f"output={root / name}"] for name, (overrides, _) in VARIANTS.items()]
    (root / "runs.yaml").write_text(yaml.safe_dump([*runs, ["max_steps=1", f"output={root / 'full'}"]]))
    torchrun(root / "program.py", root)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_two_ranks_have_the_losses_of_one_process(done, name):
    """With accumulation, clipping, an average and recomputation, beyond the end of an epoch."""
    overrides, close = VARIANTS[name]
    options = [*overrides, "efficiency.compile=false", f"output={done / name}-alone"]
    assert train.main([str(done / "recipe.yaml"), *options]) == 0
    for key in ("loss", "val_loss"):
        assert losses(done / name, key) == pytest.approx(losses(done / f"{name}-alone", key), rel=close)
    assert (done / name / "backbone.json").exists() == (name != "frozen")


@pytest.mark.slow
def test_every_rank_learns_of_a_failure_and_ends_its_threads(done):
    assert "make it readable, on every machine" in (done / "unseen.1").read_text()
    for rank in range(2):
        assert "step-00000001.pt could not be written" in (done / f"told.{rank}").read_text()
        threads = (done / f"threads.{rank}").read_text()
        assert "python" in threads
        assert "gloo" not in threads


@pytest.mark.slow
def test_bad_input_is_one_line_for_all_ranks_and_exit_code_2():
    text = torchrun("-m", "fastalign.train", "data.train=/no/such/folder", "student.weights=random", expect=1)
    (line,) = (line for line in text.splitlines() if line.startswith("fastalign:"))
    assert "no such folder: /no/such/folder" in line
    assert "exitcode  : 2 " in text
