"""The classify command: a run's backbone, bad flags, bad data."""

import json
from datetime import timedelta
from unittest.mock import Mock

import pytest
import timm
import torch
from safetensors.torch import save_file

import fastalign as fa
from fastalign.classify import classify, main
from fastalign.config import load_config
from fastalign.training import distributed
from fastalign.training.build import starting_backbone
from fastalign.training.checkpoint_files import checksum
from tests.evaluation.helpers import KWARGS, NAME, QUICK, classify_line, command_error, results, write_split


def test_the_command_on_a_run(images, tmp_path, vit, capsys):
    """The soft-cap of the run is applied; the results are next to the backbone and are not overwritten."""
    folder = tmp_path / "run"
    folder.mkdir()
    save_file(vit.state_dict(), folder / "backbone.safetensors")
    facts = {"name": NAME, "kwargs": {**KWARGS, "num_classes": 0}, "softcap": 12.5, **vit.data}
    (folder / "backbone.json").write_text(json.dumps(facts))
    assert main(classify_line(images, "--epochs", "2", "--seeds", "3", "4", backbone=folder)) == 0
    printed = capsys.readouterr().out
    written = results(folder / "classify.json")
    assert written["backbone"]["softcap"] == 12.5
    assert [seed["seed"] for seed in written["seeds"]] == [3, 4]
    assert written["command"].startswith(f"fastalign classify --backbone {folder}")
    assert f"{100 * written['mean']['top1']:.2f}%" in printed
    assert "the class token -> linear" in printed
    names = {path.name for path in folder.iterdir()}
    assert names == {"backbone.safetensors", "backbone.json", "classify.json"}, "no features are left"
    line = classify_line(images, "--epochs", "2", "--head", "attention", backbone=folder)
    assert "classify.json has the results of another setting (settings." in command_error(
        capsys, "classify", line
    )
    assert results(folder / "classify.json") == written


def test_before_is_the_backbone_that_the_run_started_from(images, recipe, capsys):
    folder = recipe("max_steps=2", "optim.lr=0.1")
    line = classify_line(images, "--epochs", "1", "--before", backbone=folder)
    assert main(line) == 0
    assert "before: " in capsys.readouterr().out
    before, aligned = (results(folder / place / "classify.json")["backbone"] for place in ("before", "."))
    assert (before["softcap"], aligned["softcap"]) == (None, 30.0)
    start = starting_backbone(load_config(folder / "config.yaml"))
    assert before["weights"] == f"{checksum(start):08x}" != aligned["weights"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--layer-decay 0.75", "--layer-decay has no effect, the backbone is frozen: add --unfreeze"),
        ("--mixup 0.8", "--mixup has no effect, features are computed once: add --augment or --unfreeze"),
        ("--batch-size 37", "--batch-size 37 is more than the 36 images of train/"),
        ("--unfreeze --accumulate 5", "must be a multiple of --accumulate x ranks = 5"),
        ("--unfreeze --augment", "--unfreeze augments anyway"),
        ("--lr 1e-3 --min-lr 1", "--min-lr 1 is above --lr 0.001"),
        ("--unfreeze --layer-decay 1.5", "--layer-decay 1.5: "),
        ("--output /dev/null/x", "--output /dev/null/x: /dev/null is"),
        ("--data /no/such", "--data /no/such has no folder train/"),
        ("--backbone /no/run --softcap 3", "--weights"),
        ("--unfreeze --randaugment swirl", "swirl"),
    ],
)
def test_bad_flags(images, tmp_path, capsys, flags, message):
    line = classify_line(images, "--output", tmp_path / "out", *flags.split())
    assert message in command_error(capsys, "classify", line)
    assert not (tmp_path / "out" / "classify.json").exists()


def test_ranks_wait_for_those_that_train(images, monkeypatch):
    """Longer than torch's ten minutes: three seeds on two ranks leave one idle for a whole training."""
    start = Mock(side_effect=fa.UserError("enough"))
    monkeypatch.setattr(distributed, "start", start)
    assert main(classify_line(images)) == 2
    assert max([*start.call_args.args, *start.call_args.kwargs.values()]) >= timedelta(days=1)


@pytest.mark.parametrize(
    ("val", "message"),
    [
        (None, "has no folder val/"),
        (["c/0.png", "d/0.png"], "val/ has classes c, d that train/ lacks"),
        (["a/0.png", "x.png", "y.png"], "2 of 3 images have no label, the first is x.png"),
    ],
)
def test_bad_data(tmp_path, capsys, val, message):
    write_split(tmp_path, "train", {"a/0.png": 0, "b/0.png": 0})
    if val:
        write_split(tmp_path, "val", dict.fromkeys(val, 0))
    assert message in command_error(capsys, "classify", classify_line(tmp_path))


def test_a_model_without_a_name(images):
    """A user's own timm model, which no timm name builds."""
    own = fa.create_backbone(timm.models.VisionTransformer(**KWARGS, num_classes=0))
    about = classify(own, images, epochs=1, **QUICK)["backbone"]
    assert (about["name"], about["weights"]) == (None, f"{checksum(own):08x}")


def test_a_loss_that_is_not_finite_ends_the_command(images, tmp_path, vit):
    with torch.no_grad():
        vit.norm.weight.fill_(float("inf"))
    with pytest.raises(fa.UserError, match=r"the loss is nan in epoch 1 of seed 0: lower --lr"):
        classify(vit, images, **QUICK)
