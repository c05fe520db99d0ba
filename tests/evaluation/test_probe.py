"""Patch probes: how heads are trained and selected, against plain loops; the command, runs, ranks, bad input."""

import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import metrics as sklearn_metrics
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.nn import functional

import fastalign as fa
from fastalign.classify import main as classify
from fastalign.config import Config
from fastalign.evaluation import patches
from fastalign.evaluation.features import PatchFeatures
from fastalign.evaluation.heads import HEADS_FOR, PATCH_HEADS, make_patch_head
from fastalign.evaluation.options import Plan, Recipe
from fastalign.evaluation.patches import Task, evaluate_head, fit_head, probe
from fastalign.evaluation.results import check_output, patch_loss, percent, write_results
from fastalign.export.__main__ import main as export
from fastalign.probe import main
from fastalign.report.__main__ import main as report
from fastalign.training.build import build_backbones
from fastalign.utils.errors import UserError
from tests.data_helpers import needs_dali
from tests.evaluation.helpers import (
    CLASSES,
    COUNTS,
    CPU,
    KWARGS,
    NAME,
    SINGLE,
    SPEC,
    classify_line,
    command_error,
    patch_features,
    probe_line,
    results,
)
from tests.numerics import randomise
from tests.run_helpers import torchrun


def eager_loss(logits, targets):
    if targets.dtype == torch.int64:
        return functional.cross_entropy(logits.reshape(-1, 3), targets.reshape(-1), ignore_index=-1)
    return functional.binary_cross_entropy_with_logits(logits, targets.float())


def eager_macro_recall(logits, targets):
    if targets.dtype == torch.int64:
        kept = targets >= 0
        return sklearn_metrics.recall_score(targets[kept], logits.argmax(-1)[kept], average="macro")
    truth, guess = targets.flatten(0, 1), logits.flatten(0, 1) > 0
    return sklearn_metrics.recall_score(truth, guess, average="macro", zero_division=0)


def eager_fit(labels, train_split, val, recipe, seed, linear):
    """The plain loop: torch's AdamW, timm's schedule stepped every update. Returns rates and epochs."""

    def batch(features, rows):
        tokens = features.tokens[0][torch.from_numpy(rows)].float()
        seen = tokens[:, :1] if labels == "global-union" else tokens[:, 1:]
        return linear(seen), features.labels(torch.from_numpy(rows), labels)

    optimizer = torch.optim.AdamW(linear.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    steps = len(train_split) // recipe.batch_size
    total = steps * recipe.epochs
    warmup = min(recipe.warmup_steps, total // 10)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=total, lr_min=recipe.min_lr, t_in_epochs=False, warmup_t=warmup
    )
    rates, epochs = [], []
    for epoch in range(1, recipe.epochs + 1):
        order = np.random.default_rng([seed, epoch]).permutation(len(train_split))
        for first in range(0, steps * recipe.batch_size, recipe.batch_size):
            rates.append(optimizer.param_groups[0]["lr"])
            loss = eager_loss(*batch(train_split, order[first : first + recipe.batch_size]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step_update(len(rates))
        with torch.no_grad():
            logits, targets = batch(val, np.arange(len(val)))
        state = {name: value.clone() for name, value in linear.state_dict().items()}
        epochs.append((eager_macro_recall(logits, targets), eager_loss(logits, targets).item(), state))
    return rates, epochs


@pytest.mark.parametrize("select", ["macro_recall", "loss"])
@pytest.mark.parametrize("labels", ["union", "majority", "global-union"])
def test_a_linear_head_is_trained_as_a_plain_loop_trains_it(labels, select, monkeypatch):
    train_split, val = patch_features(26, 1), patch_features(17, 2)
    recipe = Recipe(epochs=8, batch_size=4, lr=0.3, min_lr=0.02, warmup_steps=30, select=select)
    used, step = [], torch.optim.AdamW.step

    def recorded(self, *args):
        used.append(self.param_groups[0]["lr"])
        return step(self, *args)

    torch.manual_seed(7)
    linear = nn.Linear(6, 3)
    rates, epochs = eager_fit(labels, train_split, val, recipe, 7, linear)
    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    task, plan = Task("linear", labels, 0, 7), Plan(heads=("linear",), labels=(labels,), recipe=recipe)
    head, epoch, found = fit_head(task, SPEC, train_split, val, plan, **CPU)
    assert used == pytest.approx(rates, rel=1e-12, abs=1e-15)
    assert rates[0] == 0.0
    recalls, losses = [one[0] for one in epochs], [one[1] for one in epochs]
    best = losses.index(min(losses)) if select == "loss" else recalls.index(max(recalls))
    assert epoch == best + 1
    assert found["macro_recall"] == pytest.approx(recalls[best], abs=1e-12)
    assert found["loss"] == pytest.approx(losses[best], rel=1e-5)
    for name, value in epochs[best][2].items():
        torch.testing.assert_close(head[1].state_dict()[name], value, rtol=1e-4, atol=1e-5)
    assert used[-1] > recipe.min_lr
    if select == "macro_recall" and labels != "majority":
        assert best + 1 < recipe.epochs, "the choice is one"


def test_void_patches_do_not_count(monkeypatch):
    """The loss of a split is not a mean over batches, one of which has void patches only."""
    monkeypatch.setattr(patches, "_EVALUATION_BATCH", 3)
    split = patch_features(11, 4)
    split.majority[3:6] = -1
    for labels in ("majority", "union"):
        head = make_patch_head("linear", labels, SPEC, 3)
        with torch.no_grad():
            expected = eager_loss(head(split.tokens[0].float()), split.labels(torch.arange(11), labels))
        found = evaluate_head(head, Task("linear", labels, 0, 0), split, **CPU)
        assert found["loss"] == pytest.approx(expected.item(), rel=1e-6)
        assert ("by_size" in found) == (labels == "union")
    logits = torch.randn(2, 3, 4, requires_grad=True)
    loss = patch_loss(logits, torch.full((2, 3), -1))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_the_test_split_is_read_last(monkeypatch):
    """And once for each head, when its epoch has been selected."""
    splits = {name: patch_features(16, seed) for seed, name in enumerate(("train", "val", "test"))}
    looked, labels = [], PatchFeatures.labels

    def spy(features, rows, kind):
        looked.extend(name for name, split in splits.items() if split is features)
        return labels(features, rows, kind)

    monkeypatch.setattr(PatchFeatures, "labels", spy)
    monkeypatch.setattr(patches, "read_patch_features", lambda vit, data, *_, **__: splits[data[0]])
    plan = Plan(heads=("linear",), seeds=(0, 1), recipe=Recipe(epochs=3, batch_size=8))
    data = {name: [name] * 16 for name in splits}
    rows = probe({"m": SimpleNamespace(spec=SPEC)}, data, [plan], SINGLE)
    assert "".join(name[1] for name in looked) == 2 * (3 * "rra" + "e")
    assert [row["seed"] for row in rows] == [0, 1]


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
def test_before_and_after_a_run(scenes, recipe, capsys):
    run = recipe("max_steps=2")
    more = ["--before", "--seeds", "0", "1", "--skip-blocks", "0", "1"]
    assert main(probe_line(scenes, *more, backbone=run)) == 0
    printed = capsys.readouterr().out
    assert f"results: {run / 'probe.json'}" in printed
    table = printed[printed.rindex("macro recall") :].splitlines()[1:-1]  # after the last line of progress
    assert "test split" in " ".join(" ".join(table).split())
    assert max(map(len, table)) <= 80, "the table fits a terminal"
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
    lines = [probe_line(scenes, *more, "--output", tmp_path / name / "probe.json") for name in ("1", "2")]
    torchrun("-m", "fastalign.probe", *lines[0], ranks=1)
    said = torchrun("-m", "fastalign.probe", *lines[1])
    one, two = (results(tmp_path / name / "probe.json") for name in ("1", "2"))
    assert (two["results"], two["summary"]) == (one["results"], one["summary"])
    assert len(re.findall(r"images \(train\)", said)) == 1
    assert len(set(re.findall(r": (\w+ \w+, 0 blocks skipped, seed \d)", said))) == 8
    assert [path.name for path in (tmp_path / "2").iterdir()] == ["probe.json"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--batch-size 21", "--batch-size 21: the training split has 20 images; lower it"),
        ("--lr nan", "--lr: "),
        ("--lr 1e-5", "--min-lr 0.0001 is above --lr 1e-05: lower it"),
        ("--seeds 0 -3", "--seeds: "),
        ("--skip-blocks 0 3", "--skip-blocks 0 3: give numbers from 0 to 2"),
        ("--forward-batch 0", "--forward-batch: "),
        ("--heads mlp latent --labels global-union", "--heads latent needs one of --labels union majority"),
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


@needs_dali
def test_what_cannot_be_evaluated_is_refused(scenes, tmp_path, capsys):
    """A loss that is not finite, and a split without any label."""
    line = ["--heads", "linear", "--lr", "1e38", "--output", tmp_path / "p.json"]
    error = command_error(capsys, "probe", probe_line(scenes, *line))
    assert re.search(r"--lr: the loss of union linear of seed 0 in epoch 1 is (nan|inf); lower it", error)
    data = Path(shutil.copytree(scenes, tmp_path / "data"))
    for path in (data / "test" / "labels").iterdir():
        Image.fromarray(np.full_like(np.asarray(Image.open(path)), 255)).save(path)
    error = command_error(capsys, "probe", probe_line(data, *line))
    assert "the test split has only void pixels: check its label maps" in error


def test_files_of_results(tmp_path):
    """NaN becomes null; results of the same data elsewhere are overwritten, those of other data are not."""
    path = tmp_path / "a" / "p.json"
    write_results(path, {"a": math.nan, "b": [math.inf, 1.5, {"c": (-math.inf, 2)}]})
    assert results(path) == {"a": None, "b": [None, 1.5, {"c": [None, 2]}]}
    assert percent({"mean": math.nan, "std": None}) == "-"
    about = {"data": {"path": "coco:/a", "fingerprints": {"test": "12345678"}}, "settings": {"lr": 1e-3}}
    write_results(path, about)
    about["data"]["path"] = "coco:/b"
    check_output(path, about)
    about["data"]["fingerprints"] = {"test": "12345679"}
    with pytest.raises(UserError, match=r"data\.fingerprints\.test was 12345678, is 12345679"):
        check_output(path, about)


@needs_dali
def test_a_backbone_from_ones_own_loop(scenes, images, tmp_path, capsys):
    """It comes back as it is, as the start of a run, and from wrapped modules; the commands read it."""
    student = fa.MaskEmbedStudent.from_backbone(fa.create_backbone(NAME, **KWARGS), softcap=0.5).eval()
    own = tmp_path / "own"
    fa.save_backbone(student, own, step=6)
    randomise(student, 0.2)
    fa.save_backbone(student, own, step=7, weights="pretrained")
    start = {"name": NAME, "kwargs": KWARGS, "weights": str(own)}
    found = [fa.load_backbone(own), build_backbones(Config(student=start))[0].eval()]
    for number, wrapped in enumerate((torch.compile(student), nn.DataParallel(student), student.encoder)):
        fa.save_backbone(wrapped, tmp_path / str(number))
        found.append(fa.load_backbone(tmp_path / str(number)))
    pixels = torch.randn(2, 3, 32, 32)
    for vit in found:
        assert vit.softcap == 0.5
        assert torch.equal(vit.forward_features(pixels), student.encoder.forward_features(pixels))
    with pytest.raises(fa.UserError, match="save_backbone: softcap is set from the student"):
        fa.save_backbone(student, own, softcap=2.0)
    with pytest.raises(fa.UserError, match="save_backbone: got Linear; give a student"):
        fa.save_backbone(nn.Linear(2, 2), own)
    with pytest.raises(fa.UserError, match="save_backbone: weights are on the meta device"):
        fa.save_backbone(student.to("meta"), own)
    assert export([str(own), "--to", "timm"]) == 0
    assert report([str(own)]) == 0
    assert "before alignment is unknown" in capsys.readouterr().out
    assert main(probe_line(scenes, "--heads", "linear", "--labels", "union", backbone=own)) == 0
    assert results(own / "probe.json")["results"][0]["model"] == "aligned"
    assert classify(classify_line(images, "--epochs", "1", backbone=own)) == 0
    assert results(own / "classify.json")["backbone"]["softcap"] == 0.5
