"""Bad numbers and bad samples: skipped, reported, listed, or the end of the run."""

import json
import shutil
import signal
from functools import partial
from itertools import count

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

from fastalign.method.objectives import MaskEmbed
from fastalign.training.update import Status
from tests.data_helpers import needs_dali, write_tar
from tests.run_helpers import assert_same, checkpoint, lines, losses

EVERY_STEP = ("checkpoint.every_steps=1", "checkpoint.keep=20", "optim.ema=0.9", "data.val=null")


@pytest.fixture
def in_passes(monkeypatch):
    """Replaces the loss of some training passes, counted from 1, by `action(loss, sample_ids)`."""

    def install(numbers, action) -> None:
        forward, passes = MaskEmbed.forward, count(1)

        def changed(self, batch, sample_ids, epoch):
            loss = forward(self, batch, sample_ids, epoch)
            changes = torch.is_grad_enabled() and next(passes) in numbers
            return action(loss, sample_ids) if changes else loss

        monkeypatch.setattr(MaskEmbed, "forward", changed)

    return install


def nan(loss, sample_ids):
    return loss * float("nan")


def tensors(folder, step) -> dict:
    """Weights and moments of a checkpoint."""
    state = checkpoint(folder, step)
    return {"student": state["student"], "moments": state["optimizer"]["state"]}


@pytest.fixture(params=["at once", "an update later"])
def host(request, monkeypatch):
    """When the host reads a status: at once as on a CPU, an update later as on a GPU."""
    if request.param != "at once":
        monkeypatch.setattr("fastalign.training.run.Status", partial(Status, lag=1))


@pytest.mark.parametrize("what", ["nan", "gradient"])
def test_a_bad_update_is_skipped(recipe, in_passes, host, capsys, what):
    ids = []

    def spoil(loss, sample_ids):
        ids.extend(sample_ids.tolist())
        if what != "gradient":
            return nan(loss, sample_ids)
        loss.register_hook(lambda grad: grad * float("inf"))
        return loss

    in_passes({3}, spoil)
    folder = recipe(*EVERY_STEP, "log.every_steps=5", "max_steps=6")
    before, skipped, after = (tensors(folder, step) for step in (2, 3, 4))
    assert_same(skipped, before)
    assert all(torch.isfinite(value).all() for value in tree_leaves(after))
    for part in ("student", "moments"):
        with pytest.raises(AssertionError):
            assert_same(after[part], skipped[part])
    said = capsys.readouterr().out
    culprit = "the gradient" if what == "gradient" else "the loss of rank 0"
    assert f"{culprit} at step 3: not finite: this update was skipped" in said
    (line,) = map(json.loads, (folder / "nonfinite.jsonl").read_text().splitlines())
    assert (line["step"], line["rank"], line["ids"]) == (3, 0, ids)
    assert all(name.endswith(".jpg") for name in line["names"])
    found = losses(folder)
    assert [loss is None for loss in found] == [i == 2 and what != "gradient" for i in range(6)]
    assert losses(folder, "grad_norm")[2] is None


def test_nonfinite_stop_ends_the_run_with_the_weights_from_before(recipe, in_passes, host, capsys):
    in_passes({4}, nan)
    folder = recipe(*EVERY_STEP, "faults.nonfinite=stop", expect=2)
    said = capsys.readouterr().err
    assert said.startswith("fastalign: the loss of rank 0 at step 4: not finite; the samples are in ")
    assert "faults.nonfinite=skip" in said
    assert said.count("\n") == 1
    assert max((folder / "checkpoints").glob("step-*.pt")).name == "step-00000003.pt"
    recipe(*EVERY_STEP, "faults.nonfinite=stop")  # pass 4 is over
    assert len(losses(folder)) == 10
    assert None not in losses(folder)


def test_ten_skipped_updates_in_a_row_end_the_run(recipe, in_passes, capsys):
    in_passes(range(99), nan)
    recipe("optim.epochs=4", "data.val=null", expect=2)
    said = capsys.readouterr()
    assert "at step 10: not finite, the 10th skipped update in a row" in said.err
    assert said.out.count("this update was skipped") == 9


def test_repeated_updates_are_recorded_once(recipe, in_passes, host):
    """Updates that a kill undid, and a validation."""
    in_passes({4, 7}, nan)
    folder = recipe("max_steps=5")
    # As a signal at the end of the epoch leaves it.
    torch.save(checkpoint(folder) | {"last_eval_step": 0}, folder / "checkpoints/step-00000005.pt")
    with (folder / "nonfinite.jsonl").open("a") as file:
        file.write('{"step": 6, "rank": 0}\n{"step": 9, "rank": 0}\n')
    recipe()
    found = map(json.loads, (folder / "nonfinite.jsonl").read_text().splitlines())
    assert [line["step"] for line in found] == [4, 7]
    assert [line["step"] for line in lines(folder, "val_loss")] == [0, 5, 10]


def ask_to_stop(loss, sample_ids):
    signal.raise_signal(signal.SIGTERM)
    return loss


def test_a_signal_is_acted_on_at_once_or_an_update_later(recipe, in_passes, host, capsys):
    in_passes({2}, ask_to_stop)
    folder = recipe(expect=75)
    step = len(losses(folder))
    assert step in (2, 3)
    assert f"SIGTERM: saved {folder} at step {step}" in capsys.readouterr().err
    recipe("data.train=/nowhere", expect=2)
    assert not (folder / "preempted").exists(), "a stale marker would start the run again"
    recipe()


def test_a_signal_before_a_probe_postpones_it(recipe, in_passes, monkeypatch):
    asked, scores = [], {"macro_recall": 0.5, "map": 0.5, "loss": 0.7}
    monkeypatch.setattr("fastalign.train.open_splits", lambda *_: {})
    monkeypatch.setattr(
        "fastalign.train.probe_student", lambda run, *_: asked.append(run.state.step) or scores
    )
    in_passes({4}, ask_to_stop)
    options = ["probe.data=.", "probe.every_steps=2", "probe.best=true"]
    recipe(*options, expect=75)
    folder = recipe(*options)
    assert asked == [0, 2, 4, 6, 8, 10]
    assert [line["step"] for line in lines(folder, "probe_map")] == asked


def test_a_bad_validation_loss_is_never_the_best(recipe, monkeypatch):
    found = [1.0, float("nan"), 0.9, 0.95]
    monkeypatch.setattr("fastalign.training.validation.evaluate", lambda *_: found.pop(0))
    folder = recipe("optim.epochs=3")
    facts = json.loads((folder / "backbone.json").read_text())
    assert (facts["step"], facts["val_loss"]) == (10, 0.9)
    assert losses(folder, "val_loss") == [1.0, None, 0.9, 0.95]


@pytest.fixture
def damaged(images, tmp_path):
    """A copy of the images with five of 40 and two of ten damaged, and the names of these."""
    root, bad = tmp_path / "damaged", {"train": [], "val": []}
    shutil.copytree(images, root)
    for split, number in (("train", 5), ("val", 2)):
        for path in sorted((root / split).glob("*/*.jpg"))[3::4][:number]:
            content = path.read_bytes()
            path.write_bytes(content[: len(content) // 2])
            bad[split].append(str(path.relative_to(root / split)))
    return root, bad


def names(path) -> list[str]:
    return [json.loads(line)["name"] for line in path.read_text().splitlines()]


@needs_dali
def test_bad_samples_are_listed_once_and_change_nothing_that_follows(recipe, damaged, tmp_path, capsys):
    """In an interrupted run and in one that knows them from the start."""
    root, bad = damaged
    data = [f"data.train={root / 'train'}", f"data.val={root / 'val'}"]
    data += ["optim.epochs=3", "optim.batch_size=4"]
    whole = recipe(*data, name="whole")
    said = capsys.readouterr().out
    assert sorted(names(whole / "bad_samples.jsonl")) == sorted(bad["train"])
    assert sorted(names(whole / "validation_bad_samples.jsonl")) == sorted(bad["val"])
    assert "(truncated: a JPEG without its end); 5 bad samples in " in said
    assert "validation leaves out 2 bad samples" in said
    for steps in (1, 7, 12):
        recipe(*data, f"max_steps={steps}", name="parts")
    parts = recipe(*data, name="parts")
    assert names(parts / "bad_samples.jsonl") == names(whole / "bad_samples.jsonl")
    listed = recipe(*data, f"faults.quarantine={whole / 'bad_samples.jsonl'}", name="listed")
    assert not (listed / "bad_samples.jsonl").exists()
    assert losses(parts) == losses(whole) == losses(listed)


@needs_dali
def test_too_many_bad_samples_end_the_run_until_they_are_repaired(recipe, damaged, images, capsys):
    root, bad = damaged
    data = [f"data.train={root / 'train'}", "data.val=null"]
    data += ["faults.bad_samples=0", "checkpoint.every_steps=1"]
    for _ in range(2):
        folder = recipe(*data, expect=2)
        said = capsys.readouterr().err
        assert "bad samples in " in said
        assert "more than faults.bad_samples=0 allows; the newest is '" in said
        assert said.count("\n") == 1
    listed = names(folder / "bad_samples.jsonl")
    assert len(listed) == len(set(listed))
    assert set(listed) <= set(bad["train"])
    for name in bad["train"]:
        shutil.copy(images / "train" / name, root / "train" / name)
    recipe(*data)


@needs_dali
def test_damaged_shards_are_reported_and_listed(recipe, images, tmp_path, capsys):
    for split in ("train", "val"):
        shard = tmp_path / f"{split}.tar"
        paths = sorted((images / split).glob("*/*.jpg"))
        write_tar(shard, [(path.name, np.fromfile(path, np.uint8)) for path in paths])
        content = shard.read_bytes()
        shard.write_bytes(content[: len(content) * 2 // 3])
    data = [f"data.{split}={tmp_path / split}.tar" for split in ("train", "val")]
    for _ in range(2):
        folder = recipe(*data, "optim.epochs=1")
        said = capsys.readouterr().out
        for split, name in (("train", "bad_samples.jsonl"), ("val", "validation_bad_samples.jsonl")):
            assert f"the data set is incomplete: '{split}.tar', damaged at byte " in said
            assert names(folder / name) == [f"{split}.tar"]


@needs_dali
def test_a_validation_set_without_a_good_image_is_refused(recipe, tmp_path, capsys):
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "0.jpg").touch()
    recipe(f"data.val={tmp_path / 'val'}", expect=2)
    assert "none of its images can be used" in capsys.readouterr().err
