"""Heads and backbones are trained as said: losses, learning rates, resuming, ranks."""

import json
import os
import re
import subprocess
import sys
import zlib

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn import linear_model, metrics, preprocessing
from timm.loss import SoftTargetCrossEntropy
from torch import nn

import fastalign as fa
from fastalign.classify import classify, fit
from fastalign.classify.__main__ import main
from fastalign.classify.evaluate import alone
from fastalign.classify.features import FeatureLoader
from fastalign.classify.fit import Fit, Task, mixed_loss
from fastalign.classify.heads import LinearHead
from fastalign.classify.model import Classifier, learning_rate_factor, parameter_groups
from fastalign.classify.options import Options
from fastalign.data.loader import Loader
from fastalign.data.prefetch import Batch
from fastalign.data.sources import open_source
from fastalign.data.transforms import Transform
from fastalign.training.checkpoint_files import checksum
from tests.classify.helpers import FIGURES, KWARGS, NAME, QUICK, ROOT, same_figures, without_test


def test_a_checksum_is_the_crc_of_the_weights_as_they_lie_in_memory():
    module = nn.Module()
    module.weight = nn.Parameter(torch.arange(6.0).view(2, 3).t())  # not contiguous: read row by row
    module.register_buffer("count", torch.tensor(7))
    module.gain = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.bfloat16))
    count, gain = np.int64(7).tobytes(), np.uint16([0x3F80, 0xC000]).tobytes()
    expected = zlib.crc32(count + gain + np.float32([0, 3, 1, 4, 2, 5]).tobytes())
    assert checksum(module) == expected


def test_the_linear_head_finds_the_optimum_of_logistic_regression():
    """A convex problem has one best loss, which scikit-learn finds by another method."""
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 3, 300)
    features = (
        draw.normal(size=(300, 6)) * 1.5 + 2 + labels[:, None] * np.array([1.5, 0, 0, -1, 0, 0])
    ).astype(np.float32)
    theirs = linear_model.LogisticRegression(C=1e6, max_iter=2000).fit(features, labels)
    best = metrics.log_loss(labels, theirs.predict_proba(features))
    head, device = LinearHead(6, 3), torch.device("cpu")
    head.standardise(torch.from_numpy(features))
    loaders = {
        name: FeatureLoader(
            torch.from_numpy(features), batch_size=300, device=device, seed=0, train=name == "train"
        )
        for name in ("train", "val")
    }
    options = Options(epochs=300, batch_size=300, lr=0.1, min_lr=0.0, weight_decay=0.0).resolved()
    targets = torch.from_numpy(labels)
    task = Task(loaders, {"train": targets, "val": targets}, 3, torch.float32, 2)
    val = Fit(head, task, options, seed=0, world=alone()).run()["val"]
    assert val["loss"] == pytest.approx(best, abs=1e-4)
    assert val["top1"] == pytest.approx(theirs.score(features, labels), abs=0.01)
    assert 0.5 < val["top1"] < 0.95, "neither trivial nor separable"


@pytest.mark.parametrize(("head", "lr"), [("linear", 3e-2), ("attention", 3e-3), ("transformer", 3e-3)])
def test_separable_classes_are_told_apart(images, vit, head, lr):
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    result = classify(vit, images, head=head, epochs=30, lr=lr, seeds=(0, 1), **QUICK)
    assert result["reported"] == "test"
    assert result["mean"]["top1"] == 1.0, "colours need no pre-training"
    assert result["data"]["splits"]["train"]["images"] == 36
    assert result["data"]["classes"] == [f"class{label}" for label in range(6)]
    assert all(torch.equal(before[name], value) for name, value in vit.state_dict().items())


def test_the_figures_are_those_of_the_images_files(images, tmp_path, vit):
    """The whole way, from files to a figure, against timm's transform and scikit-learn."""
    data = without_test(images, tmp_path / "data")
    result = classify(vit, data, epochs=60, lr=3e-2, weight_decay=0.0, label_smoothing=0.1, **QUICK)
    assert result["reported"] == "val"
    assert result["selection"].startswith("none, the last epoch")
    assert result["seeds"][0]["epoch"] == 60
    model = timm.create_model(NAME, num_classes=0, **KWARGS).eval()
    model.load_state_dict(vit.state_dict())
    constants = timm.data.resolve_model_data_config(model) | {"input_size": (3, 32, 32)}
    transform = timm.data.create_transform(**constants)
    features, labels = {}, {}
    for split in ("train", "val"):
        files = sorted((images / split).rglob("*.png"))
        with torch.no_grad():
            features[split] = model(torch.stack([transform(Image.open(file)) for file in files])).numpy()
        labels[split] = [int(file.parent.name[-1]) for file in files]
    scale = preprocessing.StandardScaler().fit(features["train"])
    theirs = linear_model.LogisticRegression().fit(scale.transform(features["train"]), labels["train"])
    expected = theirs.score(scale.transform(features["val"]), labels["val"])
    assert result["mean"]["top1"] == expected == 1.0


def test_labels_follow_mixed_images_as_timms_do():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    for weight in (1.0, 0.3):
        target = timm.data.mixup.mixup_target(labels, 4, lam=weight, smoothing=0.1)
        expected = SoftTargetCrossEntropy()(logits, target)
        torch.testing.assert_close(mixed_loss(logits, labels, weight=weight, smoothing=0.1), expected)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_batches_know_how_much_of_an_image_is_left(kind):
    """Solved for from the pixels: a share of them in cutmix, a share of each in mixup."""
    transform = Transform((16, 16), (0.5,) * 3, (0.5,) * 3)
    common = {"batch_size": 4, "device": "cpu", "threads": 1}
    plain = next(Loader(open_source("synthetic:8"), transform, **common).batches())
    mixed = next(Loader(open_source("synthetic:8"), transform, **common, **{kind: 1.0}).batches())
    assert plain.weight == 1.0
    assert 0 < mixed.weight < 1
    own, other = plain.images, plain.images.flip(0)
    if kind == "cutmix":
        left = (mixed.images == own).double().mean().item()
    else:
        left = ((mixed.images - other) * (own - other)).sum() / (own - other).square().sum()
    assert mixed.weight == pytest.approx(float(left), abs=1e-4)


def test_an_update_has_the_loss_of_its_mixed_labels():
    """Two parts, mixed by different weights, with smoothed labels, in the middle of the cosine."""
    torch.manual_seed(0)
    head, labels = nn.Linear(5, 4), torch.tensor([3, 1, 0, 2])
    parts = [torch.randn(2, 5), torch.randn(2, 5)]
    expected = 0.0
    for features, own, weight in ((parts[0], labels[[2, 0]], 0.3), (parts[1], labels[[1, 3]], 0.8)):
        target = timm.data.mixup.mixup_target(own, 4, lam=weight, smoothing=0.1)
        expected += SoftTargetCrossEntropy()(head(features), target).item() / 2
    batches = iter(
        Batch(features, ids, ids.numpy(), 0.5, weight)
        for features, ids, weight in (
            (parts[0], torch.tensor([2, 0]), 0.3),
            (parts[1], torch.tensor([1, 3]), 0.8),
        )
    )
    options = Options(
        augment=True,
        epochs=2,
        batch_size=4,
        accumulate=2,
        label_smoothing=0.1,
        lr=0.1,
        min_lr=0.0,
        warmup_epochs=0,
    )
    loaders = {"train": [None, None]}
    task = Task(loaders, {"train": labels}, 4, torch.float32, 2)
    trained = Fit(head, task, options.resolved(), seed=0, world=alone())
    trained.step = 1
    measured = trained.update(batches)
    assert measured["loss"].item() == pytest.approx(expected, rel=1e-6)
    assert measured["lr"] == pytest.approx(0.05)
    assert measured["waited"] == 1.0


def test_evaluation_drops_no_path():
    vit = fa.create_backbone(NAME, **KWARGS, drop_path_rate=0.9)
    model = Classifier(vit, "attention", 6, unfreeze=True)
    nn.init.normal_(model.head.linear.weight)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 6
    loaders = {
        name: FeatureLoader(images, batch_size=3, device=torch.device("cpu"), seed=0, train=name == "train")
        for name in ("train", "val")
    }
    task = Task(loaders, {"train": labels, "val": labels}, 6, torch.float32, 2)
    trained = Fit(model, task, Options(unfreeze=True, batch_size=3).resolved(), seed=0, world=alone())
    model.train()
    found = trained.evaluate("val")["loss"]
    with torch.no_grad():
        expected = metrics.log_loss(labels, model.eval()(images).double().softmax(1), labels=range(6))
    assert found == pytest.approx(expected, rel=1e-5)


def test_layer_wise_learning_rates(vit):
    """By hand, two blocks and a decay of a half; then how far one step of Adam, which moves by the rate, gets."""
    expected = {
        "backbone.patch_embed.proj.weight": 1 / 8,
        "backbone.cls_token": 1 / 8,
        "backbone.pos_embed": 1 / 8,
        "backbone.blocks.0.attn.qkv.weight": 1 / 4,
        "backbone.blocks.1.mlp.fc2.bias": 1 / 2,
        "backbone.norm.weight": 1,
        "head.linear.weight": 1,
    }
    assert {name: learning_rate_factor(name, 2, 0.5) for name in expected} == expected
    assert learning_rate_factor("backbone.blocks.11.norm1.weight", 24, 0.5) == 0.5**13
    model = Classifier(vit, "attention", 6, unfreeze=True)
    groups = parameter_groups(model, depth=2, decay=0.5, weight_decay=0.3)
    assert sum(p.numel() for g in groups for p in g["params"]) == sum(p.numel() for p in model.parameters())
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in decayed}
    assert "backbone.blocks.0.attn.qkv.weight" in names
    assert not [name for name in names if re.search("bias|norm|token|pos_embed|query", name)]
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    loaders = {"train": FeatureLoader(images, batch_size=4, device=torch.device("cpu"), seed=0, train=True)}
    options = Options(
        unfreeze=True,
        epochs=1,
        batch_size=4,
        lr=0.01,
        weight_decay=0.0,
        layer_decay=0.5,
        warmup_epochs=0,
        clip=0,
    )
    task = Task(loaders, {"train": labels}, 6, torch.float32, 2)
    trained = Fit(model, task, options.resolved(), seed=0, world=alone())
    trained.update(loaders["train"].batches())
    for name, value in model.named_parameters():
        if name in expected:
            moved = (value - before[name]).abs().median().item()
            assert moved == pytest.approx(0.01 * expected[name], rel=0.02), name


def test_a_frozen_backbone_stays_as_it_is_and_an_unfrozen_one_moves(images, vit):
    for unfreeze in (False, True):
        model = Classifier(vit, "linear", 6, unfreeze=unfreeze).train()
        assert model.backbone.training == unfreeze
        model(torch.randn(2, 3, 32, 32)).square().sum().backward()
        trained = {name for name, value in model.named_parameters() if value.requires_grad}
        assert any(name.startswith("backbone.") for name in trained) == unfreeze
        assert {"head.linear.weight", "head.linear.bias"} <= trained


@pytest.mark.parametrize(
    "name",
    [
        "vit_base_patch16_siglip_224",
        "beit_base_patch16_224",
        "eva02_base_patch14_224",
        "vit_small_patch14_reg4_dinov2",
    ],
)
def test_every_weight_that_is_trained_has_a_gradient(name):
    """Under torchrun the gradients of all are waited for: pooling that no head reads must not be among them."""
    size = {"img_size": 28 if "patch14" in name else 32, "embed_dim": 24, "depth": 2, "num_heads": 2}
    vit = fa.create_backbone(name, **size)
    for head in ("linear", "attention"):
        model = Classifier(vit, head, 6, unfreeze=True)
        nn.init.normal_(model.head.linear.weight)
        model(torch.randn(2, 3, *vit.spec.image_size)).square().sum().backward()
        assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize(
    "flags", [{"head": "attention"}, {"unfreeze": True}, {"head": "transformer", "augment": True}]
)
def test_bf16_is_near_fp32(images, vit, flags):
    options = {"epochs": 2, "seeds": (0, 1), **flags, **QUICK}
    losses = [classify(vit, images, precision=p, **options)["mean"]["loss"] for p in ("bf16", "fp32")]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_augmentation_reaches_a_frozen_backbone(images, vit):
    """Other crops, another result; the same command, the same result."""
    options = {"epochs": 2, **QUICK}
    plain = classify(vit, images, **options)
    augmented = [classify(vit, images, augment=True, **options) for _ in range(2)]
    assert same_figures(*augmented)
    assert not same_figures(plain, augmented[0])


def test_fine_tuning_resumes_with_the_same_bits(images, tmp_path, monkeypatch):
    """Cut off in the middle of the second epoch, two updates after a checkpoint."""
    vit = fa.create_backbone(NAME, **KWARGS, drop_path_rate=0.3)
    options = {"unfreeze": True, "head": "transformer", "epochs": 3, "mixup": 0.5, "save_every": 1} | QUICK
    whole = classify(vit, images, output=tmp_path / "whole", **options)

    class Cut(Exception):
        pass

    update, calls = fit.Fit.update, []

    def interrupted(self, batches):
        calls.append(None)
        if len(calls) == 5:
            raise Cut
        return update(self, batches)

    monkeypatch.setattr(fit.Fit, "update", interrupted)
    with pytest.raises(Cut):
        classify(vit, images, output=tmp_path / "parts", **options)
    said = []
    parts = classify(vit, images, output=tmp_path / "parts", say=said.append, **options)
    assert "seed 0: resuming at step 4 of 9" in said
    assert len(calls) == 5 + 5
    assert same_figures(parts, whole)
    states = []
    for name in ("whole", "parts"):
        (path,) = (tmp_path / name / "classify" / "seed-0" / "checkpoints").glob("step-*.pt")
        states.append(torch.load(path, weights_only=True)["weights"])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    lines = (tmp_path / "parts" / "classify" / "seed-0" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 10))
    with pytest.raises(fa.UserError, match=r"settings.lr was 0.0003, is 0.001"):
        classify(vit, images, output=tmp_path / "parts", **options, lr=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--seeds", "0", "1", "2"],
        ["--seeds", "0", "1", "2", "--memory-share", "0"],
        ["--unfreeze", "--accumulate", "3"],
    ],
    ids=["frozen", "frozen, features in a file", "unfrozen"],
)
def test_two_ranks_have_the_figures_of_one(images, tmp_path, flags):
    command = [
        "--backbone",
        NAME,
        "--weights",
        "random",
        "--kwargs",
        json.dumps(KWARGS),
        "--data",
        str(images),
    ]
    command += ["--batch-size", "12", "--epochs", "2", "--threads", "1", "--head", "attention", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    assert main([*command, "--output", str(tmp_path / "1")]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    launch += ["-m", "fastalign.classify", *command, "--output", str(tmp_path / "2")]
    run = subprocess.run(launch, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    one, two = (json.loads((tmp_path / name / "classify.json").read_text()) for name in ("1", "2"))
    assert two["ranks"] == 2
    if "--unfreeze" in flags:  # gradients are summed in another order
        for name in FIGURES:
            assert two["mean"][name] == pytest.approx(one["mean"][name], rel=1e-3)
        assert two["seeds"][0]["curve"][-1]["train_loss"] == pytest.approx(
            one["seeds"][0]["curve"][-1]["train_loss"], rel=1e-4
        )
    else:
        assert same_figures(two, one)
        assert [seed["seed"] for seed in two["seeds"]] == [0, 1, 2]
        assert re.findall(r"seed (\d): val", run.stdout) == ["0", "2"], "seed 1 is the other rank's"
