"""The probe command: heads and labels, runs, ranks, bad input."""

import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastalign.evaluation.heads import HEADS_FOR, PATCH_HEADS
from fastalign.evaluation.results import check_output, percent, write_results
from fastalign.probe import main
from fastalign.utils.errors import UserError
from tests.data_helpers import needs_dali
from tests.evaluation.helpers import CLASSES, COUNTS, command_error, probe_line, results
from tests.run_helpers import torchrun


@needs_dali
def test_every_head_with_every_label(scenes, tmp_path):
    output = tmp_path / "probe.json"
    small = ["--hidden", "8", "--layers", "1", "--epochs", "1"]
    every = ["--heads", *PATCH_HEADS, "--labels", *HEADS_FOR, *small]
    assert main(probe_line(scenes, *every, "--output", output)) == 0
    found = results(output)
    assert {(row["head"], row["labels"]) for row in found["results"]} == {
        *((head, labels) for head in ("linear", "mlp") for labels in HEADS_FOR),
        *((head, labels) for head in PATCH_HEADS[2:] for labels in ("union", "majority")),
        ("transformer", "global-union"),
    }
    assert len(found["summary"]) == len(found["results"]) == 15
    for row in found["results"]:
        recall = row["test"]["per_class"]["recall"]
        assert recall[3] is None, "no kite in the test split"
        assert all(0 <= value <= 1 for value in recall[:3])


@needs_dali
def test_colours_are_read_off_any_backbone(scenes, tmp_path):
    output = tmp_path / "probe.json"
    more = ["--heads", "linear", "--labels", "union", "majority", "--epochs", "60", "--lr", "0.03"]
    assert main(probe_line(scenes, *more, "--output", output)) == 0
    for row in results(output)["results"]:
        assert row["test"]["macro_recall"] > 0.85, row["labels"]


@needs_dali
def test_before_and_after_a_run(scenes, recipe, capsys):
    run = recipe("max_steps=2")
    more = ["--before", "--seeds", "0", "1", "--skip-blocks", "0", "1"]
    assert main(probe_line(scenes, *more, backbone=run)) == 0
    printed = capsys.readouterr().out
    assert f"results: {run / 'probe.json'}" in printed
    title = printed.index("test split of")
    assert max(map(len, printed[title:].splitlines()[:-1])) <= 80, "the table fits a terminal"
    found = results(run / "probe.json")
    assert [row["model"] for row in found["results"]] == ["before"] * 4 + ["aligned"] * 4
    assert found["data"]["images"] == COUNTS
    assert found["data"]["classes"] == list(CLASSES)
    assert found["settings"]["recipe"]["epochs"] == 2
    scores = [row["test"]["macro_recall"] for row in found["results"] if row["skip_blocks"] == 1]
    for model, values in (("before", scores[:2]), ("aligned", scores[2:])):
        (row,) = (row for row in found["summary"] if (row["model"], row["skip_blocks"]) == (model, 1))
        mean, std = np.mean(values), np.std(values, ddof=1)
        assert row["test"]["macro_recall"] == pytest.approx({"mean": mean, "std": std})
        assert re.search(rf"{model} +1 +union transformer +{100 * mean:.1f}±{100 * std:.1f}", printed)


@pytest.mark.slow
@needs_dali
def test_two_ranks_have_the_results_of_one(scenes, tmp_path):
    more = ["--heads", "linear", "transformer", "--labels", "union", "majority", "--seeds", "0", "1"]
    assert main(probe_line(scenes, *more, "--output", tmp_path / "1" / "probe.json")) == 0
    line = probe_line(scenes, *more, "--output", tmp_path / "2" / "probe.json")
    said = torchrun("-m", "fastalign.probe", *line)
    one, two = (results(tmp_path / name / "probe.json") for name in ("1", "2"))
    assert (two["results"], two["summary"]) == (one["results"], one["summary"])
    assert len(re.findall(r"images \(train\)", said)) == 1
    assert len(set(re.findall(r": (\w+ \w+, 0 blocks skipped, seed \d)", said))) == 8
    assert [path.name for path in (tmp_path / "2").iterdir()] == ["probe.json"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--batch-size 21", "--batch-size 21: the training split has 20 images; lower it"),
        ("--lr nan", "--lr nan: "),
        ("--lr 1e-5", "--min-lr 0.0001 is above --lr 1e-05: lower it"),
        ("--seeds 0 -3", "--seeds 0 -3: "),
        ("--skip-blocks 0 3", "--skip-blocks 0 3: give numbers from 0 to 2"),
        (
            "--labels global-in-patch",
            "--heads transformer needs one of --labels union majority global-union",
        ),
        ("--labels union global-in-patch", "--labels global-in-patch needs one of --heads linear mlp"),
        ('--kwargs {"in_chans":1}', "--kwargs in_chans=1: images have 3 channels; remove it"),
        ("--output /", "--output /: it is a folder; name a file"),
        ("--data nowhere", "no such folder: nowhere"),
        ("--before", "--before: vit_tiny_patch16_224/config.yaml is missing"),
    ],
)
def test_bad_options(scenes, tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    assert message in command_error(capsys, "probe", probe_line(scenes, *flags.split()))
    assert not list(tmp_path.rglob("*.npy"))


@needs_dali
def test_a_split_of_void_is_refused(scenes, tmp_path, capsys):
    data = Path(shutil.copytree(scenes, tmp_path / "data"))
    for path in (data / "test" / "labels").iterdir():
        Image.fromarray(np.full_like(np.asarray(Image.open(path)), 255)).save(path)
    error = command_error(capsys, "probe", probe_line(data, "--output", tmp_path / "p.json"))
    assert "the test split has void pixels only: check its label maps" in error


@needs_dali
def test_a_loss_that_is_not_finite_ends_the_command(scenes, tmp_path, capsys):
    line = probe_line(scenes, "--heads", "linear", "--lr", "1e38", "--output", tmp_path / "p.json")
    error = command_error(capsys, "probe", line)
    assert re.search(
        r"--lr: the loss of union linear, 0 blocks skipped, seed 0 is (nan|inf); lower the rate", error
    )


def test_numbers_that_are_none_are_written_as_null(tmp_path):
    write_results(tmp_path / "a" / "p.json", {"a": math.nan, "b": [math.inf, 1.5, {"c": (-math.inf, 2)}]})
    assert results(tmp_path / "a" / "p.json") == {"a": None, "b": [None, 1.5, {"c": [None, 2]}]}
    assert percent({"mean": math.nan, "std": None}) == "-"


def test_results_of_the_same_data_elsewhere_are_overwritten(tmp_path):
    about = {"data": {"path": "coco:/a", "fingerprints": {"test": "12345678"}}, "settings": {"lr": 1e-3}}
    write_results(tmp_path / "p.json", about)
    about["data"]["path"] = "coco:/b"
    check_output(tmp_path / "p.json", about)
    about["data"]["fingerprints"] = {"test": "12345679"}
    with pytest.raises(UserError, match=r"data\.fingerprints\.test was 12345678, is 12345679"):
        check_output(tmp_path / "p.json", about)
