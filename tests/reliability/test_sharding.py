"""FSDP on two ranks: losses and checkpoints as without it; and what ranks do about a failing disk."""

from pathlib import Path

import pytest
import torch
import yaml
from torch.utils._pytree import tree_map

from fastalign import train
from fastalign.config import Config
from fastalign.training.distributed import World
from fastalign.training.run import is_sharded
from fastalign.utils.errors import UserError
from tests.run_helpers import checkpoint, losses, torchrun

SIZES = {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3}
MODEL = {"name": "vit_tiny_patch16_224", "weights": "random", "kwargs": SIZES}
VARIANTS = {
    "mim": ["objective=mim", "teacher.skip_blocks=0", "masks.mode=drop"],
    "frozen": ["student.freeze=true", "optim.ema=null"],
    "bf16": ["efficiency.precision=bf16", "masks.mode=drop", "masks.distribution=bernoulli"],
}
SHARD = "efficiency.shard=true"

# Several runs on the same two ranks: starting them is what takes long.
PROGRAM = """
import sys, yaml
from pathlib import Path
from fastalign.config import load_config
from fastalign.training import distributed
from fastalign.training.checkpoint_files import Checkpoints
from fastalign.utils.errors import SharedError, UserError
from fastalign.train import train

world, root = distributed.start(), Path(sys.argv[1])
for overrides in yaml.safe_load((root / "runs.yaml").read_text()):
    config = load_config(root / "recipe.yaml", overrides)
    try:
        train(config, world)
    except SharedError as error:
        (root / f"told.{world.rank}").write_text(str(error))
    world.barrier()
if world.main:
    Checkpoints(root / "run" / "checkpoints", keep=1).resume(world)
else:
    try:
        Checkpoints(root / "elsewhere" / "checkpoints", keep=1).resume(world)
    except UserError as error:
        (root / "unseen").write_text(str(error))
distributed.stop()
# One of gloo's threads that is alive when Python ends may abort the process.
threads = [task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
(root / f"threads.{world.rank}").write_text(" ".join(threads))
"""


def tree(folder: Path) -> dict:
    return {
        "output": str(folder / "run"),
        "student": MODEL,
        # 9 validation images: the ranks have different numbers of batches.
        "data": {"train": "synthetic:40", "val": "synthetic:9", "threads": 1},
        "optim": {"batch_size": 8, "epochs": 2, "lr": 1e-3, "ema": 0.9, "accumulate": 2, "clip": 0.5},
        "checkpoint": {"every_steps": 1, "keep": 9},
        "efficiency": {"grad_checkpointing": True, "precision": "fp32"},
        "log": {"every_steps": 2},
    }


def layout(value) -> object:
    """Keys, types, shapes and dtypes."""
    return tree_map(lambda x: (type(x), x.shape, x.dtype) if isinstance(x, torch.Tensor) else type(x), value)


def assert_close(found: dict, wanted: dict) -> None:
    """Weights, average and moments of two checkpoints, to rounding."""
    for part in ("student", "average"):
        torch.testing.assert_close(found[part], wanted[part], rtol=1e-4, atol=2e-5)
    ours, theirs = found["optimizer"]["state"], wanted["optimizer"]["state"]
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder of all runs, those of two ranks finished; `alone` runs one more on this process."""
    root = tmp_path_factory.mktemp("sharding")
    (root / "recipe.yaml").write_text(yaml.safe_dump(tree(root)))
    (root / "program.py").write_text(PROGRAM)
    (root / "full").mkdir()
    (root / "full" / "checkpoints").write_text("in the way")
    runs = [["max_steps=3"], [SHARD, "max_steps=7"]]
    runs += [[SHARD, "max_steps=2", f"output={root / name}", *options] for name, options in VARIANTS.items()]
    runs += [["max_steps=1", f"output={root / 'full'}"]]
    (root / "runs.yaml").write_text(yaml.safe_dump(runs))
    torchrun(root / "program.py", root)
    return root


def alone(root: Path, name: str, *overrides: str) -> Path:
    assert train.main([str(root / "recipe.yaml"), f"output={root / name}", *overrides]) == 0
    return root / name


@pytest.mark.slow
def test_ddp_then_fsdp_then_one_process_is_one_run(done):
    """With accumulation, clipping, an average and recomputation, against a run that nobody interrupted."""
    whole, parts = alone(done, "whole"), done / "run"
    ddp, fsdp, single = checkpoint(parts, 3), checkpoint(parts, 7), checkpoint(whole, 3)
    assert list(fsdp) == list(ddp) == list(single)
    for part in ("student", "average", "optimizer"):
        assert layout(fsdp[part]) == layout(ddp[part]) == layout(single[part])
    assert_close(fsdp, checkpoint(whole, 7))
    alone(done, "run")
    for key in ("loss", "grad_norm", "val_loss"):
        # Its validation losses: of steps 0, 3 (the first part's last), 5, 7 and 10.
        found = losses(parts, key)
        found = [found[index] for index in (0, 2, 4)] if key == "val_loss" else found
        assert found == pytest.approx(losses(whole, key), rel=1e-4)
    assert_close(checkpoint(parts), checkpoint(whole))


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_have_the_losses_of_one_process(done, name):
    single = alone(done, f"{name}-alone", "max_steps=2", *VARIANTS[name])
    close = 0.02 if name == "bf16" else 1e-4
    assert losses(done / name) == pytest.approx(losses(single), rel=close)
    assert losses(done / name, "val_loss") == pytest.approx(losses(single, "val_loss"), rel=close)
    assert (done / name / "backbone.json").exists() == (name != "frozen")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_learns_of_a_failure_and_ends_its_threads(done, rank):
    assert "step-00000001.pt could not be written" in (done / f"told.{rank}").read_text()
    assert "make it readable, on every machine" in (done / "unseen").read_text()
    threads = (done / f"threads.{rank}").read_text()
    assert "python" in threads
    assert "gloo" not in threads


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ({"efficiency": {"shard": True, "compile": True}}, "efficiency.compile"),
        ({"efficiency": {"shard": True}, "probe": {"data": "/x"}}, "probe.data"),
        ({"efficiency": {"shard": True}, "optim": {"name": "apex_adam"}}, "optim.name"),
    ],
)
def test_settings_that_are_incompatible_with_fsdp(overrides, key):
    message = rf"efficiency\.shard is incompatible with {key} \(.*\): remove one"
    with pytest.raises(UserError, match=message):
        is_sharded(Config.model_validate(overrides), World(0, 2, torch.device("cpu")))


def test_one_process_does_not_shard(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree(tmp_path)))
    assert train.main([str(path), SHARD, "max_steps=1"]) == 0
    assert "efficiency.shard: one process" in capsys.readouterr().out
