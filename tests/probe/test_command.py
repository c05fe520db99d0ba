"""The command: heads and labels, runs, ranks, bad input."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import fastalign as fa
from fastalign import train
from fastalign.evaluation.datasets import open_labelled
from fastalign.evaluation.features import probed_backbone, read_features
from fastalign.evaluation.heads import HEADS, LABELS
from fastalign.probe import main
from fastalign.report.probe import read_probe
from tests.data_helpers import needs_dali
from tests.probe.helpers import ALONE, CLASSES, COUNTS, KWARGS, NAME, ROOT, command, models, refused, results


@needs_dali
def test_every_head_with_every_label(data, tmp_path):
    output = tmp_path / "probe.json"
    more = ["--heads", *HEADS, "--labels", *LABELS, "--hidden", "8", "--layers", "1", "--epochs", "1"]
    assert main(command(data, *more, "--output", output)) == 0
    found = results(output)
    assert {(row["head"], row["labels"]) for row in found["results"]} == {
        *(("linear", labels) for labels in LABELS),
        *(("mlp", labels) for labels in LABELS),
        *((head, labels) for head in HEADS[2:] for labels in ("union", "majority")),
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
def test_colours_are_read_off_any_backbone(data, tmp_path):
    output = tmp_path / "probe.json"
    more = ["--heads", "linear", "--labels", "union", "majority", "--epochs", "60", "--lr", "0.03"]
    assert main(command(data, *more, "--output", output)) == 0
    for row in results(output)["results"]:
        assert row["test"]["macro_recall"] > 0.85, row["labels"]


@needs_dali
def test_before_and_after_a_run(data, tmp_path, capsys):
    tree = {
        "output": str(tmp_path / "run"),
        "student": {"name": NAME, "weights": "random", "kwargs": KWARGS},
        "data": {"train": str(data / "train" / "images"), "val": str(data / "val" / "images"), "threads": 1},
        "optim": {"batch_size": 10, "epochs": 1},
        "efficiency": {"compile": False},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    assert train.main([str(tmp_path / "recipe.yaml")]) == 0
    capsys.readouterr()
    line = command(
        data, "--before", "--seeds", "0", "1", "--skip-blocks", "0", "1", backbone=tmp_path / "run"
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
    read = read_probe(file)
    setting = ("union", "transformer", "1")
    assert read.models(setting) == ["before", "aligned"]
    scores = [row["test"]["macro_recall"] for row in found["results"] if row["skip_blocks"] == 1]
    for model, values in (("before", scores[:2]), ("aligned", scores[2:])):
        score = read.score(model, setting, "macro_recall")
        assert score["mean"] == pytest.approx(np.mean(values))
        assert score["std"] == pytest.approx(np.std(values, ddof=1))
    edges, recall = read.by_size(setting)
    assert len(edges) == len(recall["aligned"]) == 10
    name = command(data, "--before")
    assert "--before: vit_tiny_patch16_224/config.yaml is missing" in refused(capsys, *name)


@pytest.mark.slow
@needs_dali
def test_two_ranks_have_the_results_of_one(data, tmp_path):
    more = ["--heads", "linear", "transformer", "--labels", "union", "majority", "--seeds", "0", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    assert main(command(data, *more, "--output", tmp_path / "1" / "probe.json")) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    launch += ["-m", "fastalign.probe", *command(data, *more, "--output", tmp_path / "2" / "probe.json")]
    run = subprocess.run(launch, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    one, two = (results(tmp_path / name / "probe.json") for name in ("1", "2"))
    assert two["results"] == one["results"]
    assert two["summary"] == one["summary"]
    assert len(two["results"]) == 8
    assert len(re.findall(r"images \(train\)", run.stdout)) == 1
    assert sorted(re.findall(r": (\w+ \w+), 0 blocks skipped, seed (\d)", run.stdout)) == sorted(
        (f"{labels} {head}", seed)
        for labels in ("union", "majority")
        for head in ("linear", "transformer")
        for seed in "01"
    )
    assert [path.name for path in (tmp_path / "2").iterdir()] == ["probe.json"]


@needs_dali
def test_what_one_rank_finds_is_said(damaged, capsys, monkeypatch):
    """The command keeps all ranks but the first silent."""
    (damaged / "val" / "labels" / "val03.png").write_bytes(b"none")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(fa.UserError):
        read_features(
            probed_backbone(models()[0]),
            open_labelled(str(damaged), "val"),
            ALONE,
            folder=damaged / "cache",
            threads=1,
        )
    assert "fastalign: rank 0: label map" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epochs", "0"], "--epochs 0: it must be at least 1"),
        (["--batch-size", "0"], "--batch-size 0: it must be at least 1"),
        (["--batch-size", "21"], "--batch-size 21: the training split has 20 images; lower it"),
        (["--lr", "-1"], "--lr -1.0: it must be a positive number"),
        (["--lr", "nan"], "--lr nan: it must be a positive number"),
        (["--lr", "1e-5"], "--min-lr 0.0001: it must be from 0 to --lr, which is 1e-05"),
        (["--warmup-steps", "-1"], "--warmup-steps -1: it must be 0 or more"),
        (["--weight-decay", "-1"], "--weight-decay -1.0: it must be 0 or more"),
        (["--hidden", "0"], "--hidden 0: it must be at least 1"),
        (["--layers", "0"], "--layers 0: it must be at least 1"),
        (["--seeds", "0", "-3"], "--seeds 0 -3: it must be integers from 0 on"),
        (["--threads", "0"], "--threads 0: it must be at least 1"),
        (["--forward-batch", "0"], "--forward-batch 0: it must be at least 1"),
        (["--heads", "conv"], "argument --heads: invalid choice: 'conv'"),
        (["--labels", "onion"], "argument --labels: invalid choice: 'onion'"),
        (["--select", "recall"], "argument --select: invalid choice: 'recall'"),
        (["--precision", "fp16"], "argument --precision: invalid choice: 'fp16'"),
        (["--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
        (["--colour"], "unrecognized arguments: --colour; --help lists the options"),
        (
            ["--skip-blocks", "0", "3"],
            "--skip-blocks 0 3: the backbone has 2 blocks; give numbers from 0 to 2",
        ),
        (["--skip-blocks", "-1"], "--skip-blocks -1: the backbone has 2 blocks"),
        (
            ["--heads", "transformer", "--labels", "global-in-patch"],
            "--labels global-in-patch: it must be one of union majority global-union for --heads transformer",
        ),
        (
            ["--heads", "linear", "latent", "--labels", "global-union"],
            "--labels global-union: it must be one of union majority for --heads latent",
        ),
        (
            ["--heads", "transformer", "--labels", "union", "global-in-patch"],
            "--heads transformer: it must be one of linear mlp for --labels global-in-patch",
        ),
        (["--kwargs", "depth"], "--kwargs depth: give a mapping"),
        (["--softcap", "0"], "--softcap 0: it must be a positive number"),
        (["--output", "/"], "--output /: it is a folder; name a file"),
    ],
)
def test_bad_options(data, tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *command(data, *flags))
    assert not list(tmp_path.rglob("*.npy"))


def test_bad_places(data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no such folder: nowhere" in refused(capsys, *command("nowhere"))
    assert "vit_tinny" in refused(capsys, *command(data, backbone="vit_tinny_patch16_224"))
    assert "runs/none" in refused(capsys, *command(data, backbone="runs/none"))
    assert "required: --backbone" in refused(capsys, "--data", str(data))
    Path("file").touch()
    for option, place in (("--output", "file/probe.json"), ("--cache", "file")):
        assert "file: " in refused(capsys, *command(data, option, place))


@needs_dali
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_split_of_no_class_is_refused(damaged, tmp_path, capsys, split):
    for path in (damaged / split / "labels").iterdir():
        void = np.full_like(np.asarray(Image.open(path)), 255)
        Image.fromarray(void).save(path)
    error = refused(capsys, *command(damaged, "--output", tmp_path / "p.json"))
    assert f"the {split} split has no pixel of any class, all are void: check its label maps" in error
    # What was read to its end is there when the maps are mended.
    assert (tmp_path / "features").is_dir()


@needs_dali
def test_a_loss_that_is_no_number(data, tmp_path, capsys):
    error = refused(
        capsys, *command(data, "--heads", "linear", "--lr", "1e38", "--output", tmp_path / "p.json")
    )
    assert re.search(r"--lr: the loss of union linear, seed 0 is (nan|inf); lower the rate", error)
