"""The probe command: heads and labels, runs, ranks, bad input."""

import re

import numpy as np
import pytest
import yaml
from PIL import Image

import fastalign as fa
from fastalign import train
from fastalign.evaluation.datasets import open_labelled
from fastalign.evaluation.heads import PATCH_HEADS, PATCH_LABELS
from fastalign.evaluation.patch_features import frozen_encoder, read_patch_features
from fastalign.probe import main
from tests.data_helpers import needs_dali
from tests.evaluation.helpers import (
    CLASSES,
    COUNTS,
    NAME,
    PROBE_KWARGS,
    SINGLE,
    command_error,
    models,
    probe_line,
    results,
    torchrun,
)


@needs_dali
def test_every_head_with_every_label(scenes, tmp_path):
    output = tmp_path / "probe.json"
    more = [
        "--heads",
        *PATCH_HEADS,
        "--labels",
        *PATCH_LABELS,
        "--hidden",
        "8",
        "--layers",
        "1",
        "--epochs",
        "1",
    ]
    assert main(probe_line(scenes, *more, "--output", output)) == 0
    found = results(output)
    assert {(row["head"], row["labels"]) for row in found["results"]} == {
        *(("linear", labels) for labels in PATCH_LABELS),
        *(("mlp", labels) for labels in PATCH_LABELS),
        *((head, labels) for head in PATCH_HEADS[2:] for labels in ("union", "majority")),
        ("transformer", "global-union"),
    }
    assert len(found["summary"]) == len(found["results"]) == 15
    for row in found["results"]:
        test = row["test"]
        assert 0 <= test["macro_recall"] <= 1
        assert 0 < test["loss"] < 2
        assert test["per_class"]["recall"][3] is None, "no kite in the test split"
        assert all(value is not None for value in test["per_class"]["recall"][:3])


@needs_dali
def test_colours_are_read_off_any_backbone(scenes, tmp_path):
    output = tmp_path / "probe.json"
    more = ["--heads", "linear", "--labels", "union", "majority", "--epochs", "60", "--lr", "0.03"]
    assert main(probe_line(scenes, *more, "--output", output)) == 0
    for row in results(output)["results"]:
        assert row["test"]["macro_recall"] > 0.85, row["labels"]


@needs_dali
def test_before_and_after_a_run(scenes, tmp_path, capsys):
    tree = {
        "output": str(tmp_path / "run"),
        "student": {"name": NAME, "weights": "random", "kwargs": PROBE_KWARGS},
        "data": {
            "train": str(scenes / "train" / "images"),
            "val": str(scenes / "val" / "images"),
            "threads": 1,
        },
        "optim": {"batch_size": 10, "epochs": 1},
        "efficiency": {"compile": False},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    assert train.main([str(tmp_path / "recipe.yaml")]) == 0
    capsys.readouterr()
    line = probe_line(
        scenes, "--before", "--seeds", "0", "1", "--skip-blocks", "0", "1", backbone=tmp_path / "run"
    )
    assert main(line) == 0
    shown = capsys.readouterr().out
    file = tmp_path / "run" / "probe.json"
    assert f"results: {file}" in shown
    found = results(file)
    assert [row["model"] for row in found["results"]] == ["before"] * 4 + ["aligned"] * 4
    assert found["data"]["images"] == COUNTS
    assert found["data"]["classes"] == list(CLASSES)
    assert found["settings"]["recipe"]["epochs"] == 2
    scores = [row["test"]["macro_recall"] for row in found["results"] if row["skip_blocks"] == 1]
    for model, values in (("before", scores[:2]), ("aligned", scores[2:])):
        (row,) = (row for row in found["summary"] if (row["model"], row["skip_blocks"]) == (model, 1))
        assert row["test"]["macro_recall"]["mean"] == pytest.approx(np.mean(values))
        assert row["test"]["macro_recall"]["std"] == pytest.approx(np.std(values, ddof=1))
    error = command_error(capsys, "probe", probe_line(scenes, "--before"))
    assert "--before: vit_tiny_patch16_224/config.yaml is missing" in error


@pytest.mark.slow
@needs_dali
def test_two_ranks_have_the_results_of_one(scenes, tmp_path):
    more = ["--heads", "linear", "transformer", "--labels", "union", "majority", "--seeds", "0", "1"]
    assert main(probe_line(scenes, *more, "--output", tmp_path / "1" / "probe.json")) == 0
    line = probe_line(scenes, *more, "--output", tmp_path / "2" / "probe.json")
    run = torchrun("fastalign.probe", *line)
    assert run.returncode == 0, run.stderr
    one, two = (results(tmp_path / name / "probe.json") for name in ("1", "2"))
    assert two["results"] == one["results"]
    assert two["summary"] == one["summary"]
    assert len(two["results"]) == 8
    assert len(re.findall(r"images \(train\)", run.stdout)) == 1
    assert len(set(re.findall(r": (\w+ \w+, 0 blocks skipped, seed \d)", run.stdout))) == 8
    assert [path.name for path in (tmp_path / "2").iterdir()] == ["probe.json"]


@needs_dali
def test_what_one_rank_finds_is_said(damaged, capsys, monkeypatch):
    """The command keeps all ranks but the first silent."""
    (damaged / "val" / "labels" / "val03.png").write_bytes(b"none")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(fa.UserError):
        read_patch_features(
            frozen_encoder(models()[0]),
            open_labelled(str(damaged), "val"),
            SINGLE,
            folder=damaged / "cache",
            threads=1,
        )
    assert "fastalign: rank 0: label map" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epochs", "0"], "--epochs 0: "),
        (["--batch-size", "21"], "--batch-size 21: the training split has 20 images; lower it"),
        (["--lr", "nan"], "--lr nan: "),
        (["--lr", "1e-5"], "--min-lr 0.0001 is above --lr 1e-05: lower it"),
        (["--seeds", "0", "-3"], "--seeds 0 -3: "),
        (["--threads", "0"], "--threads 0: "),
        (["--heads", "conv"], "argument --heads: invalid choice: 'conv'"),
        (["--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
        (["--colour"], "unrecognized arguments: --colour; --help lists the options"),
        (
            ["--skip-blocks", "0", "3"],
            "--skip-blocks 0 3: the backbone has 2 blocks; give numbers from 0 to 2",
        ),
        (
            ["--labels", "global-in-patch"],
            "--heads transformer needs one of --labels union majority global-union",
        ),
        (
            ["--labels", "union", "global-in-patch"],
            "--labels global-in-patch needs one of --heads linear mlp",
        ),
        (["--kwargs", "depth"], "--kwargs depth: give a mapping"),
        (["--output", "/"], "--output /: it is a folder; name a file"),
        (["--data", "nowhere"], "no such folder: nowhere"),
        (["--backbone", "runs/none"], "runs/none"),
    ],
)
def test_bad_options(scenes, tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    made = [] if "--backbone" in flags else ["--weights", "random"]
    line = [part for part in probe_line(scenes, *flags) if part not in ("--weights", "random")] + made
    assert message in command_error(capsys, "probe", line)
    assert not list(tmp_path.rglob("*.npy"))


@needs_dali
def test_a_split_of_void_is_refused(damaged, tmp_path, capsys):
    for path in (damaged / "test" / "labels").iterdir():
        Image.fromarray(np.full_like(np.asarray(Image.open(path)), 255)).save(path)
    error = command_error(capsys, "probe", probe_line(damaged, "--output", tmp_path / "p.json"))
    assert "the test split has void pixels only: check its label maps" in error
    assert (tmp_path / "features").is_dir(), "the splits that were read are found by the next command"


@needs_dali
def test_a_loss_that_is_not_finite_ends_the_command(scenes, tmp_path, capsys):
    line = probe_line(scenes, "--heads", "linear", "--lr", "1e38", "--output", tmp_path / "p.json")
    error = command_error(capsys, "probe", line)
    assert re.search(r"--lr: the loss of union linear, seed 0 is (nan|inf); lower the rate", error)
