"""Image classification: training against other implementations, resuming, ranks; the command, bad flags, bad data."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from sklearn import metrics
from sklearn.linear_model import LogisticRegression
from timm.loss import SoftTargetCrossEntropy
from torch import nn

import fastalign as fa
from fastalign.classify import classify, main
from fastalign.config import load_config
from fastalign.data.loader import Batch
from fastalign.evaluation.fit import FeatureLoader, Fit, evaluate
from fastalign.evaluation.heads import Classifier, StandardizedLinear, parameter_groups
from fastalign.evaluation.images import make_fit
from fastalign.evaluation.options import ImageOptions
from fastalign.evaluation.results import ImageCounts
from fastalign.training.build import starting_backbone
from fastalign.training.checkpoint_files import checksum
from tests.evaluation.helpers import (
    CPU,
    FIGURES,
    KWARGS,
    NAME,
    QUICK,
    SINGLE,
    classify_line,
    command_error,
    results,
    same_figures,
    write_split,
)
from tests.run_helpers import torchrun


def whole_batch(features: torch.Tensor):
    """One batch of all features per epoch."""
    return FeatureLoader(features, len(features), CPU["device"]).batches


@pytest.mark.parametrize(("head", "lr"), [("linear", 3e-2), ("attention", 3e-3), ("transformer", 3e-3)])
def test_separable_classes_are_separated(images, vit, head, lr):
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    result = classify(vit, images, head=head, epochs=30, lr=lr, seeds=(0, 1), **QUICK)
    assert result["mean"]["top1"] == 1.0, "colours need no pre-training"
    assert result["data"]["splits"]["train"]["images"] == 36
    assert result["data"]["classes"] == [f"class{label}" for label in range(6)]
    assert all(torch.equal(before[name], value) for name, value in vit.state_dict().items())


@pytest.mark.parametrize("head", ["linear", "attention"])
@pytest.mark.parametrize(
    "name", ["vit_base_patch16_siglip_224", "beit_base_patch16_224", "vit_small_patch14_reg4_dinov2"]
)
def test_every_weight_that_is_trained_has_a_gradient(name, head):
    """torchrun waits for all gradients: the model's own pooling, which no head reads, must not be trained."""
    size = {"img_size": 28 if "patch14" in name else 32, "embed_dim": 24, "depth": 2, "num_heads": 2}
    vit = fa.create_backbone(name, **size)
    model = Classifier(vit, head, 6, unfreeze=True)
    nn.init.normal_(model.head.linear.weight)
    model(torch.randn(2, 3, *vit.spec.image_size)).square().sum().backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("flags", [{"head": "attention"}, {"unfreeze": True}, {"augment": True}])
def test_bf16_is_near_fp32(images, vit, flags):
    """One epoch: with several, a tie in accuracy can select another epoch."""
    kinds, options = ("bf16", "fp32"), {"epochs": 1, **flags, **QUICK}
    bf16, fp32 = (classify(vit, images, precision=kind, **options)["mean"]["loss"] for kind in kinds)
    assert bf16 != fp32
    assert bf16 == pytest.approx(fp32, rel=1e-3)


def test_augmentation_reaches_a_frozen_backbone(images, vit):
    """Other crops, another result; the same command, the same result."""
    plain, *augmented = (classify(vit, images, augment=a, epochs=2, **QUICK) for a in (False, True, True))
    assert same_figures(*augmented)
    assert not same_figures(plain, augmented[0])


def test_the_linear_head_finds_the_optimum_of_logistic_regression():
    """A convex problem has one optimum, which scikit-learn finds by another method."""
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 3, 300)
    shift = 2 + labels[:, None] * np.array([1.5, 0, 0, -1, 0, 0])
    features = (draw.normal(size=(300, 6)) * 1.5 + shift).astype(np.float32)
    theirs = LogisticRegression(C=1e6, max_iter=2000).fit(features, labels)
    head, tokens, targets = StandardizedLinear(6, 3), torch.from_numpy(features), torch.from_numpy(labels)
    head.standardize(tokens)
    options = ImageOptions(epochs=300, batch_size=300, lr=0.1, min_lr=0.0, weight_decay=0.0).resolved()
    fit = make_fit(head, 1, targets.__getitem__, options, 0, SINGLE, torch.float32)
    for _ in range(300):
        fit.epoch(whole_batch(tokens)(), 1)
    loss, top1 = nn.functional.cross_entropy(head(tokens), targets), theirs.score(features, labels)
    assert loss.item() == pytest.approx(metrics.log_loss(labels, theirs.predict_proba(features)), abs=1e-4)
    assert (head(tokens).argmax(1) == targets).float().mean().item() == pytest.approx(top1, abs=0.01)
    assert 0.5 < top1 < 0.95, "neither trivial nor separable"


def test_an_update_has_the_loss_of_its_mixed_labels():
    """Two parts, mixed by different weights, with smoothed labels, in the middle of the cosine."""
    torch.manual_seed(0)
    head, labels = nn.Linear(5, 4), torch.tensor([3, 1, 0, 2])
    ids, weights = (torch.tensor([2, 0]), torch.tensor([1, 3])), (0.3, 1.0)
    batches = [Batch(torch.randn(2, 5), i, weight=w) for i, w in zip(ids, weights, strict=True)]
    expected = 0.0
    for batch in batches:
        target = timm.data.mixup.mixup_target(labels[batch.ids], 4, lam=batch.weight, smoothing=0.1)
        expected += SoftTargetCrossEntropy()(head(batch.images), target).item() / 2
    options = {"epochs": 2, "accumulate": 2, "label_smoothing": 0.1, "lr": 0.1, "min_lr": 0}
    options = ImageOptions(augment=True, warmup_epochs=0, **options).resolved()
    fit = make_fit(head, 2, labels.__getitem__, options, 0, SINGLE, torch.float32)
    fit.step = 1
    assert fit.update(iter(batches)).item() == pytest.approx(expected, rel=1e-6)
    assert fit.optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


def test_evaluation_drops_no_path():
    vit, found = fa.create_backbone(NAME, **KWARGS, drop_path_rate=0.9), []
    model = Classifier(vit, "attention", 6, unfreeze=True)
    batches, labels = whole_batch(torch.randn(8, 3, 32, 32)), torch.arange(8).__getitem__
    for _ in range(2):
        counts = SimpleNamespace(add=lambda logits, labels: found.append(logits))
        evaluate(model.train(), batches(), labels, counts, **CPU)
    assert torch.equal(*found)


def test_layer_wise_learning_rates(vit):
    """Two blocks and a decay of a half, by hand: the size of the first step of Adam is the rate."""
    expected = {
        "backbone.patch_embed.proj.weight": 1 / 8,
        "backbone.cls_token": 1 / 8,
        "backbone.pos_embed": 1 / 8,
        "backbone.blocks.0.attn.qkv.weight": 1 / 4,
        "backbone.blocks.1.mlp.fc2.bias": 1 / 2,
        "backbone.norm.weight": 1,
        "head.linear.weight": 1,
    }
    model = Classifier(vit, "attention", 6, unfreeze=True)
    groups = parameter_groups(model, decay=0.5, weight_decay=0.3)
    assert sum(p.numel() for g in groups for p in g["params"]) == sum(p.numel() for p in model.parameters())
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in decayed}
    assert "backbone.blocks.0.attn.qkv.weight" in names
    assert not [name for name in names if re.search("bias|norm|token|pos_embed|query", name)]
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    options = {"epochs": 1, "lr": 0.01, "weight_decay": 0, "layer_decay": 0.5, "warmup_epochs": 0, "clip": 0}
    options = ImageOptions(unfreeze=True, **options).resolved()
    fit = make_fit(model, 1, torch.arange(4).__getitem__, options, 0, SINGLE, torch.float32)
    fit.update(whole_batch(torch.randn(4, 3, 32, 32))())
    for name, value in model.named_parameters():
        if name in expected:
            moved = (value - before[name]).abs().median().item()
            assert moved == pytest.approx(0.01 * expected[name], rel=0.02), name


@pytest.mark.parametrize(("reported", "expected"), [("test", (2, 0.6, 0.3)), ("val", (4, 0.5, None))])
def test_the_epoch_that_is_reported(images, vit, tmp_path, monkeypatch, reported, expected):
    """With a test split the first best on validation, without one the last."""
    for split in {"train", "val", reported}:
        (tmp_path / split).symlink_to(images / split)
    # In the order of measuring: validation, and test where validation is better than before.
    top1 = iter((0.2, 0.1, 0.6, 0.3, 0.6, 0.5) if reported == "test" else (0.2, 0.6, 0.6, 0.5))
    others = dict.fromkeys(FIGURES, 1.0)
    monkeypatch.setattr(ImageCounts, "results", lambda self, world: others | {"top1": next(top1)})
    result = classify(vit, tmp_path, epochs=4, **QUICK)
    (found,) = result["seeds"]
    assert (found["epoch"], found["val"]["top1"], found.get("test", {}).get("top1")) == expected
    assert (result["reported"], list(top1)) == (reported, [])


def test_fine_tuning_resumes_with_the_same_bits(images, tmp_path, monkeypatch):
    """Interrupted in the middle of the second epoch, which is repeated."""
    vit = fa.create_backbone(NAME, **KWARGS, drop_path_rate=0.3)
    options = {"unfreeze": True, "head": "transformer", "epochs": 3, "mixup": 0.5} | QUICK
    whole = classify(vit, images, output=tmp_path / "whole", **options)
    update, calls = Fit.update, []

    def interrupted(self, batches):
        calls.append(None)
        if len(calls) == 5:
            raise ZeroDivisionError
        return update(self, batches)

    monkeypatch.setattr(Fit, "update", interrupted)
    with pytest.raises(ZeroDivisionError):
        classify(vit, images, output=tmp_path / "parts", **options)
    said = []
    monkeypatch.setattr("fastalign.evaluation.fit._SAY_SECONDS", -1)
    parts = classify(vit, images, output=tmp_path / "parts", say=said.append, **options)
    assert said[:2] == ["seed 0 resumes after epoch 1 of 3", "seed 0 epoch 2: 1 of 3 batches"]
    assert len(calls) == 5 + 6
    assert same_figures(parts, whole)
    paths = [next(tmp_path.glob(f"{n}/classify/seed-0/checkpoints/step-*.pt")) for n in ("whole", "parts")]
    ours, theirs = (torch.load(path, weights_only=True)["weights"] for path in paths)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with pytest.raises(fa.UserError, match=r"settings.lr was 0.0003, is 0.001"):
        classify(vit, images, output=tmp_path / "parts", **options, lr=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--seeds 0 1 2", "--unfreeze --accumulate 3"])
def test_two_ranks_have_the_figures_of_one(images, tmp_path, flags):
    line = classify_line(images, "--epochs", "2", "--head", "attention", *flags.split(), "--output")
    torchrun("-m", "fastalign.classify", *line, tmp_path / "1", ranks=1)
    said = torchrun("-m", "fastalign.classify", *line, tmp_path / "2")
    one, two = (results(tmp_path / name / "classify.json") for name in ("1", "2"))
    assert two["ranks"] == 2
    if "--unfreeze" in flags:  # gradients are summed in another order
        losses = [found["seeds"][0]["curve"][-1]["train_loss"] for found in (one, two)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)
        for name in FIGURES:
            assert two["mean"][name] == pytest.approx(one["mean"][name], rel=1e-3)
    else:
        assert same_figures(two, one)
        assert [seed["seed"] for seed in two["seeds"]] == [0, 1, 2]
        assert re.findall(r"seed (\d): val", said) == ["0", "2"], "seed 1 is the other rank's"


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
    (folder / "before" / "classify.json").unlink()
    line = classify_line(images, "--epochs", "2", "--head", "attention", "--before", backbone=folder)
    error = command_error(capsys, "classify", line)
    assert f"{folder}/classify.json has the results of another setting (settings." in error
    assert results(folder / "classify.json") == aligned
    assert not any((folder / "before").iterdir()), "refused before the first training"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--layer-decay 0.75", "--layer-decay has no effect, the backbone is frozen: add --unfreeze"),
        ("--mixup 0.8", "--mixup has no effect, features are computed once: add --augment or --unfreeze"),
        ("--batch-size 37", "--batch-size 37 is more than the 36 images of train/"),
        ("--unfreeze --accumulate 5", "must be a multiple of --accumulate x ranks = 5"),
        ("--unfreeze --augment", "--unfreeze augments anyway"),
        ("--lr 1e-3 --min-lr 1", "--min-lr 1 is above --lr 0.001"),
        ("--unfreeze --layer-decay 1.5", "--layer-decay: "),
        ("--output /dev/null/x", "/dev/null is not a directory"),
        ("--data /no/such", "--data /no/such has no folder train/"),
        ("--backbone /no/run --softcap 3", "--weights"),
        ("--softcap inf", "--softcap must be a positive number or None, got inf"),
        ("--unfreeze --randaugment swirl", "--randaugment='swirl': it must be"),
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
        (["c/0.png", "d/0.png"], "val/ has 2 classes that train/ lacks, such as c"),
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


@pytest.mark.parametrize("lr", [1e6, 1e38])
def test_a_training_that_diverges_ends_the_command(images, vit, lr):
    """Even if it is the last update that does so: the loss of every update before it was finite."""
    with pytest.raises(fa.UserError, match=r"--lr: the loss of seed 0 in epoch 1 is (nan|[\d.e+]+); lower"):
        classify(vit, images, **QUICK | {"lr": lr, "epochs": 1})
