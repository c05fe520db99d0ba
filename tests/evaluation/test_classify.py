"""The classify command: a run's backbone, bad flags, bad data."""

import pytest
import timm
import torch

import fastalign as fa
from fastalign.classify import classify, main
from fastalign.config import load_config
from fastalign.training.build import starting_backbone
from fastalign.training.checkpoint_files import checksum
from tests.evaluation.helpers import KWARGS, QUICK, classify_line, command_error, results, write_split


def test_the_command_on_a_run(images, recipe, capsys):
    """With the run's soft-cap, and before it; the results are next to the backbone and are not overwritten."""
    folder = recipe("max_steps=2", "optim.lr=0.1", "student.softcap=12.5")
    names = {path.name for path in folder.iterdir()}
    capsys.readouterr()
    line = ["--epochs", "2", "--seeds", "3", "4", "--before"]
    assert main(classify_line(images, *line, backbone=folder)) == 0
    printed = capsys.readouterr().out
    before, aligned = (results(folder / place / "classify.json") for place in ("before", "."))
    assert (before["backbone"]["softcap"], aligned["backbone"]["softcap"]) == (None, 12.5)
    start = starting_backbone(load_config(folder / "config.yaml"))
    assert before["backbone"]["weights"] == f"{checksum(start):08x}" != aligned["backbone"]["weights"]
    assert [seed["seed"] for seed in aligned["seeds"]] == [3, 4]
    assert aligned["command"].startswith(f"fastalign classify --backbone {folder}")
    assert "before: test split, the class token -> linear" in printed
    assert f"{100 * aligned['mean']['top1']:.2f}%" in printed
    assert {path.name for path in folder.iterdir()} == names | {"classify.json", "before"}
    line = classify_line(images, "--epochs", "2", "--head", "attention", backbone=folder)
    error = command_error(capsys, "classify", line)
    assert "classify.json has the results of another setting (settings." in error
    assert results(folder / "classify.json") == aligned


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
        ("--output /dev/null/x", "/dev/null/x: Not a directory"),
        ("--data /no/such", "--data /no/such has no folder train/"),
        ("--backbone /no/run --softcap 3", "--weights"),
        ("--unfreeze --randaugment swirl", "swirl"),
    ],
)
def test_bad_flags(images, tmp_path, capsys, flags, message):
    line = classify_line(images, "--output", tmp_path / "out", *flags.split())
    assert message in command_error(capsys, "classify", line)
    assert not (tmp_path / "out" / "classify.json").exists()


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
