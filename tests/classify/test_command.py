"""The command: a run's backbone, bad flags, bad data."""

import json
import re
from datetime import timedelta

import pytest
import torch
from safetensors.torch import save_file

import fastalign as fa
from fastalign.classify import classify
from fastalign.training import distributed
from tests.classify.helpers import KWARGS, NAME, QUICK, made, run


def test_the_command_on_a_run(images, tmp_path, vit, capsys):
    """The soft-cap that the run recorded counts, the result lies beside the backbone, and is not overwritten."""
    folder = tmp_path / "run"
    folder.mkdir()
    save_file(vit.state_dict(), folder / "backbone.safetensors")
    facts = {"name": NAME, "kwargs": {**KWARGS, "num_classes": 0}, "softcap": 12.5, **vit.data}
    (folder / "backbone.json").write_text(json.dumps(facts))
    assert run(images, "--epochs", "2", "--seeds", "3", "4", backbone=str(folder)) == 0
    printed = capsys.readouterr().out
    written = json.loads((folder / "classify.json").read_text())
    assert written["backbone"]["softcap"] == 12.5
    assert [seed["seed"] for seed in written["seeds"]] == [3, 4]
    assert written["command"].startswith(f"python -m fastalign.classify --backbone {folder}")
    assert f"{100 * written['mean']['top1']:.2f}%" in printed
    assert "the class token -> linear" in printed
    assert run(images, "--epochs", "2", "--head", "attention", backbone=str(folder)) == 2
    assert "settings.epochs" not in (error := capsys.readouterr().err)
    assert re.fullmatch(r"fastalign: .*classify.json has the figures of another setting .*\n", error)
    assert json.loads((folder / "classify.json").read_text()) == written


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--head", "mlp"], "--head mlp: it must be one of linear, attention, transformer"),
        (["--layer-decay", "0.75"], "--layer-decay has no effect, the backbone is frozen: add --unfreeze"),
        (
            ["--mixup", "0.8"],
            "--mixup has no effect, features are computed once: add --augment or --unfreeze",
        ),
        (["--batch-size", "37"], "--batch-size 37 is more than the 36 images of train/"),
        (["--unfreeze", "--accumulate", "5"], "must be a multiple of --accumulate x ranks = 5"),
        (["--unfreeze", "--augment"], "--unfreeze augments anyway"),
        (["--lr", "0"], "--lr 0.0: it must be a positive number"),
        (["--lr", "nan"], "--lr nan: it must be a positive number"),
        (["--lr", "1e-3", "--min-lr", "1"], "--min-lr 1 is above --lr 0.001"),
        (["--seeds", "1", "1"], "--seeds 1 1: give different numbers"),
        (["--seeds", "0", "-1"], "--seeds 0 -1: give different numbers, 0 or more"),
        (["--seeds", "0,1"], "argument --seeds: invalid int value: '0,1'; --help lists the options"),
        (["--seeds"], "argument --seeds: expected at least one argument"),
        (["--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
        (["--colour"], "unrecognized arguments: --colour; --help lists the options"),
        (["--unfreeze", "--layer-decay", "1.5"], "--layer-decay 1.5: it must be in 0..1"),
        (["--softcap", "-3"], "--softcap -3: it must be a positive number"),
        (["--kwargs", "[1"], "--kwargs [1:"),
        (["--kwargs", "3"], "--kwargs 3: give a mapping"),
        (["--output", "/dev/null/x"], "--output /dev/null/x: /dev/null is no folder; name another output"),
        (["--data", "/no/such"], "--data /no/such: no such folder"),
        (["--backbone", "/no/run", "--softcap", "3"], "--weights goes with a timm name"),
        (["--weights", "/no/file.pth"], "--weights=/no/file.pth: there is no such file"),
        (["--precision", "fp16"], "--precision fp16: it must be auto, bf16 or fp32"),
        (["--unfreeze", "--randaugment", "swirl"], "swirl"),
    ],
)
def test_bad_flags(images, tmp_path, capsys, flags, message):
    assert run(images, "--output", str(tmp_path / "out"), *flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("fastalign: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out" / "classify.json").exists()


def test_ranks_wait_for_those_that_train(images, monkeypatch):
    """Longer than torch's ten minutes: three seeds on two ranks leave one idle for a whole training."""
    asked = []

    def start(timeout=None):
        asked.append(timeout)
        raise fa.UserError("enough")

    monkeypatch.setattr(distributed, "start", start)
    assert run(images) == 2
    assert asked[0] >= timedelta(days=1)


def test_bad_data(tmp_path, capsys):
    folders = {"a/0.png": 0, "b/0.png": 0}
    cases = [
        ({"train": folders}, "has no folder val/"),
        ({"train": folders, "val": {"c/0.png": 0, "d/0.png": 0}}, "val/ has classes c, d that train/ lacks"),
        ({"train": {"a/0.png": 0}, "val": {"a/0.png": 0}}, "all images of train/ are of class a"),
        (
            {"train": folders, "val": {"a/0.png": 0, "x.png": 0, "y.png": 0}},
            "2 of 3 images have no label, the first is x.png",
        ),
    ]
    for number, (splits, message) in enumerate(cases):
        for split, files in splits.items():
            made(tmp_path / str(number), split, files)
        assert run(tmp_path / str(number), "--output", str(tmp_path / "out")) == 2
        assert message in capsys.readouterr().err
    for split in ("train", "val"):
        made(tmp_path / "table", split, {"0.png": 1, "1.png": 2, "2.png": None}, table=True)
    assert run(tmp_path / "table", "--output", str(tmp_path / "out")) == 2
    assert "1 of 3 images have no label, the first is 2.png" in capsys.readouterr().err


def test_a_loss_that_is_no_number_ends_the_command(images, tmp_path, vit):
    with torch.no_grad():
        vit.norm.weight.fill_(float("inf"))
    with pytest.raises(fa.UserError, match=r"the loss is nan in epoch 1 of seed 0: lower --lr"):
        classify(vit, images, **QUICK)
