"""Heads and what they read, and their metrics, against timm, torch and scikit-learn."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics
from sklearn import preprocessing
from timm.models.vision_transformer import Block as TimmBlock
from torch import nn

from fastalign.backbones.spec import BlockSpec, ViTSpec
from fastalign.evaluation.heads import (
    AttentionHead,
    Classifier,
    ClassTokenTransformer,
    StandardizedLinear,
    make_patch_head,
)
from fastalign.evaluation.results import ImageCounts, MultiClassCounts, MultiLabelCounts
from tests.evaluation.helpers import KWARGS, SINGLE, models

SPEC = ViTSpec(BlockSpec(24, 3, 96), 1, image_size=(3, 3), patch_size=(1, 1), registers=1)
BARE = replace(SPEC, class_token=False, registers=0)


def timm_head(classes, *, latent=0):
    """The transformer head, written with timm's blocks."""

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.pos_embed = nn.Parameter(torch.zeros(latent or 11, 24))
            self.norm_pre, self.norm = nn.LayerNorm(24), nn.LayerNorm(24)
            block = partial(TimmBlock, 24, 3, init_values=0.01, norm_layer=nn.LayerNorm)
            self.blocks = nn.Sequential(block(), block())
            self.head = nn.Linear(24, classes)

        def forward(self, x):
            extra = self.pos_embed.expand(len(x), -1, -1)
            x = torch.cat([x, extra], 1) if latent else x + extra
            return self.head(self.norm(self.blocks(self.norm_pre(x))))

    return Head()


SAME, PATCHES = nn.Identity(), lambda x: x[:, 2:]
PREFIX, MEAN = lambda x: x[:, :2].mean(1, keepdim=True), lambda x: x.mean(1, keepdim=True)


@pytest.mark.parametrize(
    ("name", "labels", "prefix", "read", "take"),
    [
        ("linear", "union", 2, PATCHES, SAME),
        ("mlp", "global-in-patch", 2, PATCHES, SAME),
        ("mlp", "global-union", 2, PREFIX, SAME),
        ("linear", "global-union", 0, MEAN, SAME),
        ("transformer", "union", 2, SAME, PATCHES),
        ("transformer", "majority", 2, SAME, PATCHES),
        ("transformer", "global-union", 2, SAME, PREFIX),
        ("transformer", "global-union", 0, SAME, MEAN),
        ("latent", "union", 2, SAME, lambda x: x[:, -9:]),
        ("latent-global", "union", 2, PREFIX, lambda x: x[:, -9:]),
    ],
)
def test_patch_heads_read_the_right_tokens_and_equal_timms_blocks(name, labels, prefix, read, take):
    torch.manual_seed(0)
    spec = SPEC if prefix else replace(BARE, image_size=(1, 11))
    head = make_patch_head(name, labels, spec, 4, hidden=16).double()
    theirs = head[1]
    if name not in ("linear", "mlp"):
        theirs = timm_head(4, latent=9 if "latent" in name else 0).double()
        theirs.load_state_dict(head[1].state_dict())
    tokens = torch.randn(3, 11, 24, dtype=torch.float64)
    torch.testing.assert_close(head(tokens), take(theirs(read(tokens))), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"reg_tokens": 2}, {"class_token": False, "global_pool": "avg", "reg_tokens": 1, "fc_norm": True}],
    ids=["class token", "class token and registers", "mean of patches and fc_norm"],
)
def test_what_a_linear_head_reads_is_what_timm_pools(kwargs):
    vit, model = models(**KWARGS, **kwargs)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(Classifier(vit, "linear", 6).features(images), model(images))
        everything = Classifier(vit, "attention", 6).features(images)
        torch.testing.assert_close(everything, model.forward_features(images))


def test_features_are_standardised_as_scikit_learn_does():
    features = torch.randn(100, 4) * torch.tensor([100.0, 1, 0.01, 0]) + torch.tensor([5.0, 0, 3, 7])
    head = StandardizedLinear(4, 4)
    head.standardize(features)
    with torch.no_grad():
        head.linear.weight.copy_(torch.eye(4))
    expected = preprocessing.StandardScaler().fit_transform(features.double().numpy())
    torch.testing.assert_close(
        head(features)[:, :3].double(), torch.from_numpy(expected[:, :3]), atol=1e-4, rtol=1e-4
    )
    assert not head(features)[:, 3].any(), "a channel that never changes says nothing"


def test_the_attention_head_is_multihead_attention_of_one_query():
    head, tokens = AttentionHead(128, 2, 5).eval(), torch.randn(3, 7, 128)
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
    head, tokens = ClassTokenTransformer(128, 2, 5, 7).eval(), torch.randn(3, 7, 128)
    x = torch.cat([head.query.expand(3, -1, -1), head.norm(tokens) + head.position], 1)
    for block in head.blocks:
        theirs = TimmBlock(128, 2, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6))
        theirs.load_state_dict(block.state_dict())
        x = theirs.eval()(x)
    torch.testing.assert_close(head(tokens), head.linear(head.norm_out(x[:, 0])))


# --- metrics


def scores(classes=5, images=40, patches=9, seed=0):
    """Logits with ties and, for the last class, no positive."""
    rng = np.random.default_rng(seed)
    targets = rng.random((images, patches, classes)) < np.array([0.5, 0.2, 0.05, 0.6, 0.0])
    logits = np.round(rng.normal(size=targets.shape) + 1.5 * targets - 0.7, 2)
    logits[..., 2] = -4.0  # never predicted
    return torch.from_numpy(logits), torch.from_numpy(targets)


def check(found, truth, guess, labels=None):
    """Macro averages and lists of classes, of which the last has no positive."""
    wanted = sklearn_metrics.precision_recall_fscore_support(truth, guess, labels=labels, zero_division=0)
    for name, values in zip(("precision", "recall", "f1"), wanted, strict=False):
        assert found[f"macro_{name}"] == pytest.approx(values[:4].mean(), abs=1e-12)
        assert found["per_class"][name][:4] == pytest.approx(values[:4].tolist(), abs=1e-12)
        assert found["per_class"][name][4] is None


def test_multi_label_metrics_agree_with_scikit_learn():
    logits, targets = scores()
    counts = MultiLabelCounts(5)
    for part in range(0, 40, 15):
        counts.add(logits[part : part + 15], targets[part : part + 15])
    found = counts.results()
    truth, guess = targets.flatten(0, 1).numpy(), (logits.flatten(0, 1) > 0).numpy()
    check(found, truth, guess)
    accuracy = (truth == guess).mean(0)
    assert found["macro_accuracy"] == pytest.approx(accuracy[:4].mean(), abs=1e-12)
    assert found["per_class"]["accuracy"][:4] == pytest.approx(accuracy[:4].tolist(), abs=1e-12)
    assert found["accuracy"] == pytest.approx(accuracy.mean(), abs=1e-12)
    assert found["per_class"]["positives"] == truth.sum(0).tolist()
    every = [
        sklearn_metrics.average_precision_score(truth[:, c], logits.flatten(0, 1)[:, c]) for c in range(4)
    ]
    # Scores are counted in bins of 1/128; these have two decimals, so that no bin holds two different ones.
    assert found["per_class"]["average_precision"][:4] == pytest.approx(every, abs=1e-12)
    assert found["map"] == pytest.approx(np.mean(every), abs=1e-12)


def test_recall_by_size_follows_the_definition():
    logits, targets = scores(seed=1)
    counts = MultiLabelCounts(5)
    counts.add(logits, targets)
    found = counts.results()["by_size"]
    count = targets.sum(1, keepdim=True)  # of nine patches: (0, 0.1], (0.1, 0.2]...
    buckets = ((-(-count * 10 // 9) - 1).expand_as(targets))[targets]
    positives = np.bincount(buckets, minlength=10)
    hits = np.bincount(buckets, weights=logits[targets] > 0, minlength=10)
    assert found["positives"] == positives.tolist()
    for got, hit, whole in zip(found["recall"], hits, positives, strict=True):
        assert got is None if whole == 0 else got == pytest.approx(hit / whole)


def test_multi_class_metrics_agree_with_scikit_learn_and_leave_void_out():
    rng = np.random.default_rng(2)
    targets = rng.integers(-1, 4, (30, 9))
    logits = rng.normal(size=(30, 9, 5)) + 2 * np.eye(5)[targets.clip(0)]
    logits[..., 3] = -9  # never predicted
    counts = MultiClassCounts(5)
    for part in (slice(0, 7), slice(7, 30)):
        counts.add(torch.from_numpy(logits[part]), torch.from_numpy(targets[part]))
    found = counts.results()
    kept = targets >= 0
    truth, guess = targets[kept], logits.argmax(-1)[kept]
    check(found, truth, guess, labels=range(5))
    assert found["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(truth, guess), abs=1e-12)
    right = [((truth == c) == (guess == c)).mean() for c in range(4)]
    assert found["macro_accuracy"] == pytest.approx(np.mean(right), abs=1e-12)


def test_image_metrics_agree_with_scikit_learn():
    """Of nine classes, the last has no image."""
    torch.manual_seed(0)
    labels, logits = torch.randint(0, 8, (200,)), torch.randn(200, 9)
    counts = ImageCounts(9, torch.device("cpu"))
    for part in (slice(0, 70), slice(70, 200)):
        counts.add(logits[part], labels[part])
    found, guesses, names = counts.results(SINGLE), logits.argmax(1), range(9)
    recall = sklearn_metrics.recall_score(labels, guesses, labels=range(8), average="macro")
    assert found["top1"] == pytest.approx(sklearn_metrics.accuracy_score(labels, guesses))
    assert found["top5"] == pytest.approx(
        sklearn_metrics.top_k_accuracy_score(labels, logits, k=5, labels=names)
    )
    assert found["mean_per_class"] == pytest.approx(recall)
    assert found["loss"] == pytest.approx(
        sklearn_metrics.log_loss(labels, logits.double().softmax(1), labels=names)
    )
    few = ImageCounts(5, torch.device("cpu"))
    few.add(logits[:, :5], labels % 5)
    assert few.results(SINGLE)["top5"] is None
