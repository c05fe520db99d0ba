"""Classification of image folders: figures, heads, learning rates, both modes, ranks, resume, bad input."""

import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys
import zlib
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn import linear_model, metrics, preprocessing
from timm.loss import SoftTargetCrossEntropy
from torch import nn

import fastalign as fa
from fastalign.classify import classify, fit
from fastalign.classify.__main__ import main
from fastalign.classify.evaluate import alone
from fastalign.classify.features import FeatureLoader, _file, _mapped, extract
from fastalign.classify.fit import Fit, Task, mixed_loss
from fastalign.classify.heads import AttentionHead, LinearHead, TransformerHead, represent
from fastalign.classify.labels import open_splits
from fastalign.classify.model import Classifier, learning_rate_factor, parameter_groups
from fastalign.classify.options import Options
from fastalign.classify.scores import Tally, select, summarise
from fastalign.data.loader import Loader
from fastalign.data.prefetch import Batch
from fastalign.data.source import Subset
from fastalign.data.sources import open_source
from fastalign.data.transforms import Transform
from fastalign.engine.checkpoint import checksum
from fastalign.engine.metrics import mean_and_spread
from fastalign.ranks import distributed
from tests.data_helpers import encode, write_tar

ROOT = Path(__file__).parent.parent
NAME = "vit_tiny_patch16_224"
KWARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
FIGURES = ("top1", "top5", "mean_per_class", "loss")
QUICK = {"batch_size": 12, "threads": 1}


@pytest.fixture(autouse=True)
def _one_thread():
    """Tensors this small are slower on two."""
    torch.set_num_threads(1)


@pytest.fixture
def vit():
    return fa.create_backbone(NAME, **KWARGS)


def picture(label: int, draw: np.random.Generator) -> Image.Image:
    """A class is a colour; the rest is noise."""
    colour = np.array([(label & 1) * 160, (label >> 1 & 1) * 160, (label >> 2 & 1) * 160])
    return Image.fromarray((colour + draw.integers(0, 90, (36, 40, 3))).astype(np.uint8))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Six classes as folders: 36 training images, 18 for validation, 12 for the test."""
    root, draw = tmp_path_factory.mktemp("classes"), np.random.default_rng(0)
    for split, each in (("train", 6), ("val", 3), ("test", 2)):
        for label in range(6):
            for number in range(each):
                path = root / split / f"class{label}" / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture(label, draw).save(path)
    return root


def without_test(images: Path, folder: Path) -> Path:
    folder.mkdir()
    for split in ("train", "val"):
        (folder / split).symlink_to(images / split)
    return folder


def same_figures(ours: dict, theirs: dict) -> bool:
    return [s["curve"] for s in ours["seeds"]] == [s["curve"] for s in theirs["seeds"]] and all(
        ours["mean"][name] == theirs["mean"][name] for name in FIGURES
    )


# Figures


def test_figures_by_hand():
    """Six classes, of which the last has no image; ranks 1, 2, 5, 6 of the right class, and once more 1."""
    logits = torch.tensor(
        [
            [9.0, 5, 4, 3, 2, 1],  # 0: right
            [9.0, 5, 4, 3, 2, 1],  # 1: second
            [9.0, 5, 1, 3, 2, 0],  # 2: fifth
            [9.0, 5, 4, 0, 2, 1],  # 3: last
            [1.0, 2, 3, 4, 9, 5],  # 4: right
            [9.0, 2, 3, 4, 1, 5],  # 4: last
        ]
    )
    labels = torch.tensor([0, 1, 2, 3, 4, 4])
    tally = Tally(6, torch.device("cpu"))
    tally.add(logits[:2], labels[:2])
    tally.add(logits[2:], labels[2:])
    figures = tally.figures(alone())
    assert figures["top1"] == 2 / 6
    assert figures["top5"] == 4 / 6
    assert figures["mean_per_class"] == pytest.approx((1 + 0 + 0 + 0 + 0.5) / 5)
    assert figures["loss"] == pytest.approx(
        metrics.log_loss(labels, logits.double().softmax(1), labels=range(6))
    )


def test_figures_against_scikit_learn():
    torch.manual_seed(0)
    labels, logits = torch.randint(0, 9, (200,)), torch.randn(200, 9)
    tally = Tally(9, torch.device("cpu"))
    tally.add(logits, labels)
    figures, guesses = tally.figures(alone()), logits.argmax(1)
    assert figures["top1"] == pytest.approx(metrics.accuracy_score(labels, guesses))
    assert figures["top5"] == pytest.approx(metrics.top_k_accuracy_score(labels, logits, k=5))
    assert figures["mean_per_class"] == pytest.approx(metrics.balanced_accuracy_score(labels, guesses))
    few = Tally(5, torch.device("cpu"))
    few.add(logits[:, :5], labels % 5)
    assert few.figures(alone())["top5"] is None


def test_the_epoch_that_is_reported():
    """With a test split the first best on validation, without one the last."""
    figures = {
        "val": [{"top1": x, "loss": 0.0} for x in (0.2, 0.6, 0.6, 0.5)],
        "test": [{"top1": x} for x in (0.1, 0.3, 0.9, 0.8)],
    }
    for has_test, expected in ((True, (2, 0.6, 0.3)), (False, (4, 0.5, None))):
        best = None
        for epoch in range(4):
            evaluate = lambda split, epoch=epoch: figures[split][epoch]  # noqa: E731
            best, _ = select(best, epoch, 4, evaluate, has_test=has_test)
        assert (best["epoch"], best["val"]["top1"], best.get("test", {}).get("top1")) == expected


def test_mean_and_spread_over_seeds():
    results = [
        {"val": {"top1": x, "top5": None, "mean_per_class": x, "loss": 1 - x}} for x in (0.25, 0.5, 1.0)
    ]
    mean, std = summarise(results, "val")
    assert (mean["top1"], std["top1"]) == pytest.approx(
        (np.mean([0.25, 0.5, 1]), np.std([0.25, 0.5, 1], ddof=1))
    )
    assert mean["top5"] is None
    assert summarise(results[:1], "val")[1]["top1"] is None
    results[1]["val"]["loss"] = math.nan
    mean, std = summarise(results, "val")
    assert math.isnan(mean["loss"])
    assert std["loss"] is None
    assert std["top1"] == pytest.approx(np.std([0.25, 0.5, 1], ddof=1))


@pytest.mark.parametrize("values", [[math.inf, 1.0], [math.inf, -math.inf], [math.nan]])
def test_what_is_not_finite_has_a_mean_and_no_spread(values):
    with np.errstate(invalid="ignore"):
        expected = np.mean(values)
    assert mean_and_spread(values) == {"mean": pytest.approx(expected, nan_ok=True), "std": None}


def test_a_checksum_is_the_crc_of_the_weights_as_they_lie_in_memory():
    module = nn.Module()
    module.weight = nn.Parameter(torch.arange(6.0).view(2, 3).t())  # not contiguous: read row by row
    module.register_buffer("count", torch.tensor(7))
    module.gain = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.bfloat16))
    count, gain = np.int64(7).tobytes(), np.uint16([0x3F80, 0xC000]).tobytes()
    expected = zlib.crc32(count + gain + np.float32([0, 3, 1, 4, 2, 5]).tobytes())
    assert checksum(module) == expected


# Heads


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"reg_tokens": 2}, {"class_token": False, "global_pool": "avg", "reg_tokens": 1, "fc_norm": True}],
    ids=["class token", "class token and registers", "mean of patches and fc_norm"],
)
def test_what_a_linear_head_reads_is_what_timm_pools(kwargs):
    vit = fa.create_backbone(NAME, **KWARGS, **kwargs)
    model = timm.create_model(NAME, num_classes=0, **KWARGS, **kwargs)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.load_state_dict(vit.state_dict())
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        ours = represent(vit.eval(), vit.forward_features(images), "linear")
        torch.testing.assert_close(ours, model.eval()(images))
        everything = represent(vit, vit.forward_features(images), "attention")
        torch.testing.assert_close(everything, model.forward_features(images))


def test_features_are_standardised_as_scikit_learn_does():
    features = torch.randn(100, 4) * torch.tensor([100.0, 1, 0.01, 0]) + torch.tensor([5.0, 0, 3, 7])
    head = LinearHead(4, 4)
    head.standardise(features)
    with torch.no_grad():
        head.linear.weight.copy_(torch.eye(4))
    expected = preprocessing.StandardScaler().fit_transform(features.double().numpy())
    torch.testing.assert_close(
        head(features)[:, :3].double(), torch.from_numpy(expected[:, :3]), atol=1e-4, rtol=1e-4
    )
    assert not head(features)[:, 3].any(), "a channel that never changes says nothing"


def test_the_attention_head_is_multihead_attention_of_one_query():
    head, tokens = AttentionHead(128, 5).eval(), torch.randn(3, 7, 128)
    theirs = nn.MultiheadAttention(128, 2, batch_first=True)
    with torch.no_grad():
        nn.init.normal_(head.query)
        nn.init.normal_(head.kv.weight)
        theirs.in_proj_weight.copy_(torch.cat([torch.eye(128), head.kv.weight]))
        theirs.in_proj_bias.zero_()
        theirs.out_proj.load_state_dict(head.proj.state_dict())
        normed = head.norm(tokens)
        pooled, _ = theirs(head.query.expand(3, 1, -1), normed, normed)
        expected = head.linear(head.norm_out(pooled[:, 0]))
        torch.testing.assert_close(head(tokens), expected)


def test_the_transformer_head_is_timms_blocks():
    head, tokens = TransformerHead(128, 5, 7).eval(), torch.randn(3, 7, 128)
    x = torch.cat([head.query.expand(3, -1, -1), head.norm(tokens) + head.position], 1)
    for block in head.blocks:
        theirs = timm.models.vision_transformer.Block(
            128, 2, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6)
        )
        theirs.load_state_dict(block.state_dict())
        x = theirs.eval()(x)
    torch.testing.assert_close(head(tokens), head.linear(head.norm_out(x[:, 0])))


# Training


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


def test_features_come_in_the_order_of_images():
    transform = Transform((8, 8), (0.5,) * 3, (0.5,) * 3)
    for train, epoch, start in ((True, 3, 1), (True, 0, 0), (False, 0, 1)):
        common = {"batch_size": 3, "device": torch.device("cpu"), "seed": 5, "train": train}
        images = Loader(open_source("synthetic:10"), transform, threads=1, **common)
        features = FeatureLoader(torch.arange(10.0), **common)
        expected = [batch.ids.tolist() for batch in images.batches(epoch, start)]
        found = list(features.batches(epoch, start))
        assert [batch.ids.tolist() for batch in found] == expected
        assert [batch.images.tolist() for batch in found] == expected
        assert len(features) == len(images)
        images.close()


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


def test_features_that_no_disk_can_hold(images, tmp_path, vit, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(fa.UserError, match=r"of 36 images take 0.0 GB, more than .* choose a larger disk"):
        classify(vit, images, output=tmp_path, memory_share=0.0, **QUICK)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT], ids=errno.errorcode.get)
def test_features_for_which_the_disk_proves_too_small(images, tmp_path, vit, monkeypatch, number):
    """A quota, or another command that was quicker: said before anything is written to the file's map."""

    def full(handle, offset, size):
        assert (offset, size) == (0, 36 * 32 * 4)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(fa.UserError, match=r"of 36 images take 0.0 GB, more than .* choose a larger disk"):
        classify(vit, images, output=tmp_path / "out", memory_share=0.0, **QUICK)
    assert not list((tmp_path / "out").iterdir())


def test_a_features_file_has_its_room_and_is_its_commands_own(tmp_path):
    first, second = (_mapped(tmp_path, (3, 1000), torch.float32, 12000, alone()) for _ in range(2))
    first.fill_(1.0)
    assert not second.any()
    assert not list(tmp_path.iterdir()), "a command that is killed leaves nothing"
    path = _file(tmp_path, 10**6)
    assert path.stat().st_size == 10**6
    assert path.stat().st_blocks * 512 >= 10**6, "not sparse"


def test_a_features_file_serves_one_machine(vit, tmp_path, monkeypatch):
    """Two ranks, each the only one of its machine; in the sum over ranks both are short of memory."""
    loader = SimpleNamespace(source=range(36))
    world = SimpleNamespace(size=2, device=torch.device("cpu"), sum=lambda value: value * 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    common = {"dtype": torch.float32, "folder": tmp_path, "share": 0.0}
    with pytest.raises(
        fa.UserError, match=r"^the features of 36 images .* one machine only: raise --memory-sh"
    ):
        extract(vit, "linear", loader, world, **common)
    assert not list(tmp_path.iterdir())


def test_features_in_a_file_are_those_in_memory(images, tmp_path, vit):
    options = {"head": "attention", "epochs": 2, **QUICK}
    memory = classify(vit, images, **options)
    file = classify(vit, images, output=tmp_path / "out", memory_share=0.0, **options)
    assert same_figures(file, memory)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["classify.json"]


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


# Data


def made(root: Path, split: str, files: dict[str, int | None], *, table: bool = False) -> Path:
    """Images by name, with a labels.csv of those that have a label."""
    draw = np.random.default_rng(0)
    for name, label in files.items():
        path = root / split / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(label or 0, draw).save(path)
    if table:
        lines = ["name,label", *(f"{name},{label}" for name, label in files.items() if label is not None)]
        (root / split / "labels.csv").write_text("\n".join(lines))
    return root


def labels_of(root: Path):
    said = []
    splits, classes = open_splits(root, alone(), said.append)
    return {name: split.labels.tolist() for name, split in splits.items()}, classes, said


def test_classes_are_matched_by_name(tmp_path):
    """Validation lacks the middle one: its images must not slide into the gap."""
    made(tmp_path, "train", {"a/0.png": 0, "b/0.png": 0, "c/x/0.png": 0})
    made(tmp_path, "val", {"c/0.png": 0, "a/0.png": 0})
    labels, classes, said = labels_of(tmp_path)
    assert (labels, classes) == ({"train": [0, 1, 2], "val": [0, 2]}, ["a", "b", "c"])
    assert said == ["val/ has no image of class b: mean per class is over the other classes"]


def test_labels_in_a_table(tmp_path):
    """Integers sort by value; pictures beside images/ are none of ours."""
    for split in ("train", "val"):
        made(tmp_path / split, "images", {"0.png": 10, "1.png": 9, "2.png": 100}, table=True)
        made(tmp_path / split, "masks", {"0.png": 0})
    labels, classes, said = labels_of(tmp_path)
    assert (labels["val"], classes, said) == ([1, 0, 2], ["9", "10", "100"], [])


def test_labels_in_shards(tmp_path):
    draw = np.random.default_rng(0)

    def text(label):
        return np.frombuffer(label.encode(), dtype=np.uint8)

    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for shard in range(2):
            members = []
            for number in range(2):
                key = f"dir.x/{shard}{number}"  # a dot in a folder's name ends no key
                members.append((f"{key}.cls", text(f"{2 - number}\n")))
                members.append((f"{key}.crop.png", encode(picture(number, draw), "PNG")))
            write_tar(tmp_path / split / f"{shard}.tar", members)
    labels, classes, _ = labels_of(tmp_path)
    assert (labels["train"], classes) == ([1, 0, 1, 0], ["1", "2"])
    write_tar(tmp_path / "val" / "1.tar", [("a.png", encode(picture(0, draw), "PNG"))])
    with pytest.raises(fa.UserError, match=r"1 of 3 images have no label, the first is .*1.tar:a.png"):
        labels_of(tmp_path)
    write_tar(
        tmp_path / "val" / "1.tar", [("a.png", encode(picture(0, draw), "PNG")), ("a.cls", text("x" * 5000))]
    )
    with pytest.raises(fa.UserError, match=r"1.tar:a.cls has 5000 bytes"):
        labels_of(tmp_path)


def test_a_part_of_a_source_has_its_classes(tmp_path):
    whole = open_source(str(made(tmp_path, "all", {"a/0.png": 0, "b/0.png": 1, "c/0.png": 2}) / "all"))
    part = Subset(whole, np.array([2, 0, 2]))
    assert part.class_names() == ["c", "a", "c"]
    assert [part.portable_name(index)[0] for index in range(3)] == ["c", "a", "c"]


# The command


def run(images: Path, *flags: str, backbone: str = NAME) -> int:
    random = ["--weights", "random", "--kwargs", json.dumps(KWARGS)] if backbone == NAME else []
    return main(
        [
            "--backbone",
            backbone,
            "--data",
            str(images),
            *random,
            "--batch-size",
            "12",
            "--threads",
            "1",
            *flags,
        ]
    )


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

    def start(patience=None):
        asked.append(patience)
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
