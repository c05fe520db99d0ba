"""The probe: features, training, selection, caches, ranks, results and command, against timm, PIL and plain loops."""

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from rich.console import Console
from sklearn import metrics as sklearn_metrics
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.nn import functional

import fastalign as fa
from fastalign import train
from fastalign.build import named_backbone
from fastalign.data.transforms import Transform, geometry
from fastalign.models.vit import ViT
from fastalign.probe import features as features_module
from fastalign.probe import run as run_module
from fastalign.probe.__main__ import main
from fastalign.probe.datasets import open_labelled
from fastalign.probe.features import Features, feature_files, probed_backbone, read_features
from fastalign.probe.fit import Recipe, Task, evaluate, fit, head_loss
from fastalign.probe.heads import HEADS, LABELS, TokenShape, make_head
from fastalign.probe.results import percent, summarise, table_of, write_results
from fastalign.probe.run import Plan, probe
from fastalign.ranks.distributed import World
from fastalign.report.probe import read_probe
from tests.data_helpers import needs_dali

ROOT = Path(__file__).parent.parent
NAME = "vit_tiny_patch16_224"
KWARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "reg_tokens": 1}
CLASSES = ("sky", "grass", "road", "kite")
ALONE = World(0, 1, torch.device("cpu"))
COUNTS = {"train": 20, "val": 8, "test": 6}
SHAPE = TokenShape(patches=4, prefix=1, width=6, heads=2)
QUICK = ["--epochs", "2", "--batch-size", "5", "--threads", "1", "--forward-batch", "4"]


@pytest.fixture(autouse=True)
def _one_thread():
    """Tensors this small are slower on two."""
    torch.set_num_threads(1)


def scene(draw: np.random.Generator, split: str) -> tuple[Image.Image, Image.Image]:
    """Noise coloured by class: sky above, grass below, a road somewhere, a strip that is void."""
    height, width = (int(n) for n in draw.integers(34, 60, 2))
    labels = np.full((height, width), 1, np.uint8)
    labels[: draw.integers(height // 4, height // 2)] = 0
    left = int(draw.integers(0, width - 12))
    labels[height // 2 :, left : left + 12] = 2
    labels[:, -5:] = 255
    if split == "train":
        labels[3:8, 3:9] = 3
    colours = np.zeros((256, 3), np.uint8)
    colours[[0, 1, 2, 3]] = (60, 90, 160), (40, 150, 40), (120, 110, 100), (170, 20, 20)
    pixels = colours[labels] + draw.integers(0, 70, (height, width, 3)).astype(np.uint8)
    return Image.fromarray(pixels), Image.fromarray(labels)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root, draw = tmp_path_factory.mktemp("scenes"), np.random.default_rng(0)
    for split, count in COUNTS.items():
        for number in range(count):
            for kind, image in zip(("images", "labels"), scene(draw, split), strict=True):
                path = root / split / kind / f"{split}{number:02d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path)
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return root


@pytest.fixture
def damaged(data, tmp_path):
    """A copy to be spoilt."""
    return Path(shutil.copytree(data, tmp_path / "damaged"))


def models():
    """Ours and timm's with the same weights, none of which is still as it was initialised."""
    vit = fa.create_backbone(NAME, **KWARGS)
    model = timm.create_model(NAME, num_classes=0, **KWARGS).eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.load_state_dict(vit.state_dict())
    return vit, model


def command(data, *more, backbone=NAME):
    made = ["--weights", "random", "--kwargs", json.dumps(KWARGS)] if backbone == NAME else []
    return ["--backbone", str(backbone), *made, "--data", str(data), *QUICK, *map(str, more)]


def results(path: Path) -> dict:
    return json.loads(path.read_text())


# Features


def pil_input(path: Path, vit) -> torch.Tensor:
    """The largest centre square, resized and normalised."""
    image = Image.open(path)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side)).resize((32, 32), Image.Resampling.BILINEAR)
    mean, std = (np.array(vit.data[name]) for name in ("mean", "std"))
    return torch.from_numpy((np.asarray(image) / 255 - mean) / std).float().permute(2, 0, 1)


@needs_dali
def test_features_are_timms_of_pils_pixels(data):
    vit, model = models()
    probed = probed_backbone(vit, (0, 1))
    for split in ("val", "test"):
        read = read_features(probed, open_labelled(str(data), split), ALONE, batch_size=3, threads=1)
        files = sorted((data / split / "images").iterdir())
        images = torch.stack([pil_input(path, vit) for path in files])
        with torch.no_grad():
            expected = model.forward_features(images)
        assert read.tokens[0].dtype == torch.bfloat16
        assert read.tokens[0].shape == expected.shape == (COUNTS[split], 2 + 16, 32)
        error = (read.tokens[0].float() - expected).norm(dim=-1) / expected.norm(dim=-1)
        # bf16 costs 0.002. The loader's pixels are within one level of PIL's (0.17 on average), but for the crop's
        # edge, where its filter looks over it. The evaluation crop, which is a pixel off, costs 0.14.
        assert error.mean() < 0.015
        assert error.max() < 0.06, "each token of each image in its place"
        for index, path in enumerate(files):
            labels = Image.open(data / split / "labels" / path.name)
            side = min(labels.size)
            left, top = (labels.width - side) // 2, (labels.height - side) // 2
            cut = labels.crop((left, top, left + side, top + side)).resize((32, 32), Image.Resampling.NEAREST)
            patches = np.asarray(cut).reshape(4, 8, 4, 8).swapaxes(1, 2).reshape(16, 64)
            union = np.stack([(patches == c).any(1) for c in range(4)], 1)
            rows = np.array([index])
            assert np.array_equal(read.labels(rows, "union")[0].numpy(), union)
            assert np.array_equal(read.labels(rows, "global-union")[0, 0].numpy(), union.any(0))
            assert read.labels(rows, "global-in-patch")[0].tolist() == [union.any(0).tolist()] * 16
            counts = np.stack([(patches == c).sum(1) for c in range(4)], 1)
            majority = np.where(counts.any(1), counts.argmax(1), -1)
            assert np.array_equal(read.labels(rows, "majority")[0].numpy(), majority)


def test_the_centre_crop_in_whole_pixels():
    square = Transform((224, 224), (0.5,) * 3, (0.5,) * 3, crop="center")
    wide = Transform((16, 32), (0.5,) * 3, (0.5,) * 3, crop="center")
    shapes, ids = np.array([[481, 640], [640, 481]]), np.arange(2)
    found = geometry(square, shapes, ids, seed=0, epoch=0)
    assert found.roi_start.tolist() == [[0, 79], [79, 0]]
    assert found.roi_end.tolist() == [[481, 560], [560, 481]]
    assert not len(found.padded)
    found = geometry(wide, np.array([[40, 20]]), ids[:1], seed=3, epoch=5)
    assert (found.roi_start.tolist(), found.roi_end.tolist()) == ([[15, 0]], [[25, 20]])
    assert not wide.is_random


@pytest.mark.parametrize("skip", [0, 1, 2])
def test_skipped_blocks_are_pruned_and_the_final_norm_stays(skip):
    vit, model = models()
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        found = probed_backbone(vit, (2, 0, 1, 0)).encode(images)
        model.blocks = model.blocks[: 2 - skip]
        torch.testing.assert_close(found[(2, 0, 1).index(skip)], model.forward_features(images))
    assert len(found) == 3, "asked for twice, read once"


# Training


def made_features(count: int, seed: int, classes: int = 3) -> Features:
    """Tokens that say something about their labels; the last class is rare, some patches are void."""
    draw = np.random.default_rng(seed)
    union = draw.random((count, 4, classes)) < np.array([0.5, 0.4, 0.15])
    majority = np.where(union.any(-1), union.argmax(-1), -1).astype(np.int16)
    # The directions are the same in all splits.
    directions = np.random.default_rng(99).normal(size=(classes, 6))
    tokens = draw.normal(size=(count, 5, 6))
    tokens[:, 1:] += union @ directions
    tokens[:, 0] += union.any(1) @ directions
    return Features(
        {0: torch.from_numpy(tokens).bfloat16()},
        np.packbits(union, axis=-1),
        majority,
        union.any(1),
        classes,
    )


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
        return linear(seen), features.labels(rows, labels)

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
    train_split, val = made_features(26, 1), made_features(17, 2)
    recipe = Recipe(epochs=8, batch_size=4, lr=0.3, min_lr=0.02, warmup_steps=3, select=select)
    used, step = [], torch.optim.AdamW.step

    def recorded(self, *args):
        used.append(self.param_groups[0]["lr"])
        return step(self, *args)

    torch.manual_seed(5)
    linear = nn.Linear(6, 3)
    head = nn.Sequential(make_head("linear", labels, SHAPE, 3)[0], nn.Linear(6, 3))
    head[1].load_state_dict(linear.state_dict())
    rates, epochs = eager_fit(labels, train_split, val, recipe, 7, linear)
    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    where = {"device": torch.device("cpu"), "dtype": torch.float32}
    head, epoch, found = fit(head, Task("linear", labels, 0, 7), train_split, val, recipe, **where)
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


def test_the_warm_up_is_at_most_a_tenth():
    with_all, cut = (Recipe(epochs=10, batch_size=4, warmup_steps=steps) for steps in (500, 5))
    train_split, val = made_features(20, 1), made_features(8, 2)
    ends = []
    for recipe in (with_all, cut):  # 50 updates
        torch.manual_seed(0)
        head = make_head("mlp", "union", SHAPE, 3, hidden=4)
        head, _, found = fit(
            head,
            Task("mlp", "union", 0, 0),
            train_split,
            val,
            recipe,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
        ends.append(found["loss"])
    assert ends[0] == ends[1]


def test_void_patches_teach_nothing():
    logits = torch.randn(2, 3, 4, requires_grad=True)
    targets = torch.tensor([[1, -1, 3], [-1, -1, 0]])
    kept = functional.cross_entropy(logits[[0, 0, 1], [0, 2, 2]], torch.tensor([1, 3, 0]))
    assert head_loss(logits, targets).item() == pytest.approx(kept.item(), rel=1e-6)
    loss = head_loss(logits, torch.full((2, 3), -1))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_the_loss_of_a_split_is_over_all_patches(monkeypatch):
    """Not over batches, of which one has less to say than another."""
    monkeypatch.setattr("fastalign.probe.fit._EVALUATION_BATCH", 3)
    split = made_features(11, 4)
    split.majority[3:6] = -1
    for labels in ("majority", "union"):
        head = make_head("linear", labels, SHAPE, 3)
        with torch.no_grad():
            expected = eager_loss(head(split.tokens[0].float()), split.labels(np.arange(11), labels))
        found = evaluate(
            head, Task("linear", labels, 0, 0), split, device=torch.device("cpu"), dtype=torch.float32
        )
        assert found["loss"] == pytest.approx(expected.item(), rel=1e-6)
        assert ("by_size" in found) == (labels == "union")


def test_the_test_split_is_looked_at_last(monkeypatch):
    """And once a head, when its epoch has been chosen."""
    looked = []
    splits = {name: made_features(16, seed) for seed, name in enumerate(("train", "val", "test"))}
    for name, split in splits.items():

        def spy(rows, kind, name=name, original=split.labels):
            looked.append(name)
            return original(rows, kind)

        object.__setattr__(split, "labels", spy)
    monkeypatch.setattr(run_module, "read_features", lambda probed, data, *args, **kwargs: splits[data.name])
    data = {name: Named(name) for name in splits}
    probed = SimpleNamespace(sets=(0,), shape=SHAPE)
    plan = Plan(heads=("linear",), seeds=(0, 1), recipe=Recipe(epochs=3, batch_size=8))
    rows = probe({"m": probed}, data, [plan], ALONE)
    assert "".join(name[1] for name in looked) == 2 * (3 * "rra" + "e")
    assert [row["seed"] for row in rows] == [0, 1]


class Named(list):
    """Sixteen images by name, that nobody opens."""

    def __init__(self, name):
        super().__init__(range(16))
        self.name = name


# Files of features


@pytest.fixture
def passes(monkeypatch):
    """How many images each pass through a backbone had."""
    counted, original = [], ViT.forward_layers

    def forward(self, images, skip_blocks):
        counted.append(len(images))
        return original(self, images, skip_blocks)

    monkeypatch.setattr(ViT, "forward_layers", forward)
    return counted


@needs_dali
def test_features_are_read_once_and_deleted_unless_they_are_to_stay(data, tmp_path, passes):
    everything, output = sum(COUNTS.values()), tmp_path / "out" / "probe.json"
    assert main(command(data, "--output", output)) == 0
    first = results(output)["results"]
    assert sum(passes) == everything, "one pass for two epochs"
    assert [path.name for path in output.parent.iterdir()] == ["probe.json"]
    cache = tmp_path / "kept"
    assert main(command(data, "--output", output, "--cache", cache, "--keep-features")) == 0
    assert sum(passes) == 2 * everything
    sizes = {path.name: path.stat().st_size - 128 for path in cache.rglob("*.npy")}
    assert sizes.keys() == {"tokens-0.npy", "union.npy", "majority.npy", "whole.npy"}
    (tokens,) = (path for path in cache.rglob("tokens-0.npy") if np.load(path).shape[0] == COUNTS["train"])
    assert tokens.stat().st_size - 128 == COUNTS["train"] * 18 * 32 * 2
    # Found again, by commands that delete only what they made.
    seeds = tmp_path / "seeds.json"
    assert main(command(data, "--output", seeds, "--cache", cache, "--seeds", "0", "1")) == 0
    assert sum(passes) == 2 * everything
    kept = sorted(cache.rglob("*"))
    assert len(list(cache.iterdir())) == 3
    assert results(seeds)["results"][0] == first[0]
    other = ["--output", tmp_path / "layer.json", "--cache", cache, "--skip-blocks", "1"]
    assert main(command(data, *other)) == 0
    assert sorted(cache.rglob("*")) == kept


@needs_dali
def test_interrupted_features_are_read_anew(data, tmp_path, monkeypatch, passes):
    vit, _ = models()
    split = open_labelled(str(data), "train")
    options = {"folder": tmp_path, "batch_size": 4, "threads": 1}
    expected = read_features(probed_backbone(vit), split, ALONE, batch_size=4, threads=1)
    count, whole = len(passes), probed_backbone(vit)

    def breaks(images):
        if len(passes) == count + 2:
            raise KeyboardInterrupt
        return whole.encode(images)

    broken = features_module.Probed(**{**vars(whole), "encode": breaks})
    with pytest.raises(KeyboardInterrupt):
        read_features(broken, split, ALONE, **options)
    assert len(passes) == count + 2
    # Another layer must not make the half-written one look complete.
    read_features(probed_backbone(vit, (1,)), split, ALONE, **options)
    assert len(passes) == count + 2 + 5
    again = read_features(whole, split, ALONE, **options)
    assert len(passes) == count + 2 + 5 + 5
    assert torch.equal(again.tokens[0], expected.tokens[0])
    for kind in LABELS:
        rows = np.arange(len(split))
        assert torch.equal(again.labels(rows, kind), expected.labels(rows, kind))
    files = feature_files(whole, split, tmp_path, torch.float32)
    assert files.complete()
    with (files.place / "tokens-0.npy").open("r+b") as file:
        file.truncate(1000)
    assert not files.complete()


def test_other_weights_data_or_layers_have_other_files(data, tmp_path):
    vit, _ = models()
    split = open_labelled(str(data), "train")
    places = [feature_files(probed_backbone(vit), split, tmp_path, torch.float32).place]
    places.append(feature_files(probed_backbone(vit), split, tmp_path, torch.bfloat16).place)
    places.append(
        feature_files(probed_backbone(vit), open_labelled(str(data), "val"), tmp_path, torch.float32).place
    )
    vit.softcap = 30.0
    places.append(feature_files(probed_backbone(vit), split, tmp_path, torch.float32).place)
    with torch.no_grad():
        vit.blocks[0].mlp.fc1.bias[3] += 1
    places.append(feature_files(probed_backbone(vit), split, tmp_path, torch.float32).place)
    assert len(set(places)) == 5


def refused(capsys, *arguments) -> str:
    """The one line that the command refuses with."""
    capsys.readouterr()
    assert main(list(map(str, arguments))) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastalign: ")
    assert error.count("\n") == 1
    return error


def test_what_a_second_command_writes_is_not_written_too(data, tmp_path, capsys):
    vit = named_backbone(NAME, weights="random", kwargs=json.dumps(KWARGS))[0]
    split = open_labelled(str(data), "train")
    files = feature_files(probed_backbone(vit), split, tmp_path / "c", torch.float32)
    with files.claimed():
        error = refused(capsys, *command(data, "--output", tmp_path / "p.json", "--cache", tmp_path / "c"))
        files.remove()
        assert files.place.is_dir()
    assert f"--cache {tmp_path / 'c'}: another command is reading" in error
    files.remove()
    assert not files.place.exists()


def test_a_full_disk(data, tmp_path, capsys, monkeypatch):
    line = command(data, "--output", tmp_path / "p.json", "--cache", tmp_path / "c")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
        assert "the features take 0.0 GB, 0.0 GB are free; name a folder with room" in refused(capsys, *line)
    full = OSError(28, "No space left on device")

    def fallocate(*args):
        raise full

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    assert "name a folder with room" in refused(capsys, *line)
    assert not list((tmp_path / "c").rglob("*.npy"))


# The command


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
        assert score.mean == pytest.approx(np.mean(values))
        assert score.std == pytest.approx(np.std(values, ddof=1))
    edges, recall = read.by_size("aligned", setting)
    assert (len(edges), len(recall)) == (11, 10)
    name = command(data, "--before")
    assert "--before: vit_tiny_patch16_224/config.yaml is missing" in refused(capsys, *name)


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


# Bad input


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


# Results


def row(model, seed, recall, *, skip=0, head="linear", **more):
    """A head's row with a few figures."""
    test = {"macro_recall": recall, "macro_precision": 0.5, "macro_f1": 0.5, "accuracy": 1.0, "loss": 0.25}
    key = {"model": model, "labels": "union", "head": head, "skip_blocks": skip}
    return {**key, "seed": seed, "test": test | more}


def test_mean_and_spread_over_seeds_by_hand():
    rows = [row("a", 0, 0.5, map=0.25), row("b", 0, 0.9), row("a", 1, 0.7, map=0.75)]
    first, second = summarise(rows)
    assert (first["model"], first["seeds"], second["model"], second["seeds"]) == ("a", 2, "b", 1)
    assert first["test"]["macro_recall"]["mean"] == pytest.approx(0.6)
    assert first["test"]["macro_recall"]["std"] == pytest.approx(math.sqrt(0.02))
    assert first["test"]["map"] == {"mean": 0.5, "std": pytest.approx(math.sqrt(0.125))}
    assert first["test"]["loss"] == {"mean": 0.25, "std": 0.0}
    assert second["test"]["macro_recall"] == {"mean": 0.9, "std": None}
    assert "map" not in second["test"]
    assert percent(first["test"]["macro_recall"]) == "60.0 ± 14.1"
    assert percent(second["test"]["macro_recall"]) == "90.0"


def shown(rows) -> str:
    console = Console(width=80, file=io.StringIO())
    console.print(table_of(summarise(rows), "test split of /data/scenes"))
    return console.file.getvalue()


def test_the_table_fits_a_terminal():
    rows = [
        row(model, seed, 0.5 + 0.3 * seed, head="transformer", skip=skip, map=0.3)
        for model in ("before", "aligned")
        for skip in (0, 1)
        for seed in (0, 1)
    ]
    text = shown(rows)
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("65.0±21.2") == 4
    assert "seeds: 2" in text
    assert "skip" in text.splitlines()[1]
    text = shown([one for one in rows if one["skip_blocks"] == 0])
    assert len([line for line in text.splitlines() if "union transformer" in line]) == 2, "a line a row"
    text = shown([one for one in rows if one["skip_blocks"] == 1 and one["model"] == "before"])
    assert "before, test split of /data/scenes, skipped blocks: 1" in " ".join(text.split())
    assert "skip " not in text


def test_numbers_that_are_none_are_written_as_null(tmp_path):
    write_results(tmp_path / "a" / "p.json", {"a": math.nan, "b": [math.inf, 1.5, {"c": (-math.inf, 2)}]})
    assert results(tmp_path / "a" / "p.json") == {"a": None, "b": [None, 1.5, {"c": [None, 2]}]}
    assert percent({"mean": math.nan, "std": None}) == "-"


def test_results_of_another_probe_are_not_overwritten(data, tmp_path, capsys):
    path = tmp_path / "p.json"
    first = command(data, "--heads", "linear", "--output", path)
    assert main(first) == 0
    kept = path.read_bytes()
    assert main(command(data, "--heads", "mlp", "--output", path)) == 2
    assert "it holds results of another probe; name another file" in capsys.readouterr().err
    assert path.read_bytes() == kept
    assert main(first) == 0  # the same again is the same
    assert results(path)["results"] == json.loads(kept)["results"]
