"""Metrics of patches and images, by hand and against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics

from fastalign.evaluation.results import ImageCounts, MultiClassCounts, MultiLabelCounts
from tests.evaluation.helpers import SINGLE


def scores(classes=5, images=40, patches=9, seed=0):
    """Logits with ties and, for the last class, no positive."""
    rng = np.random.default_rng(seed)
    targets = rng.random((images, patches, classes)) < np.array([0.5, 0.2, 0.05, 0.6, 0.0])
    logits = np.round(rng.normal(size=targets.shape) + 1.5 * targets - 0.7, 2)
    logits[..., 2] = -4.0  # never predicted
    return torch.from_numpy(logits), torch.from_numpy(targets)


def test_multi_label_metrics_agree_with_scikit_learn():
    logits, targets = scores()
    counts = MultiLabelCounts(5)
    for part in range(0, 40, 15):
        counts.add(logits[part : part + 15], targets[part : part + 15])
    found = counts.results()
    truth, guess = targets.flatten(0, 1).numpy(), (logits.flatten(0, 1) > 0).numpy()
    present = truth.any(0)
    precision, recall, f1, _ = sklearn_metrics.precision_recall_fscore_support(truth, guess, zero_division=0)
    accuracy = (truth == guess).mean(0)
    for name, wanted in (("recall", recall), ("precision", precision), ("f1", f1), ("accuracy", accuracy)):
        assert found[f"macro_{name}"] == pytest.approx(wanted[present].mean(), abs=1e-12)
        listed = found["per_class"][name]
        assert listed[:4] == pytest.approx(wanted[:4].tolist(), abs=1e-12)
        assert listed[4] is None
    assert found["accuracy"] == pytest.approx((truth == guess).mean(), abs=1e-12)
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
    names = range(5)
    precision, recall, f1, _ = sklearn_metrics.precision_recall_fscore_support(
        truth, guess, labels=names, zero_division=0
    )
    for name, wanted in (("recall", recall), ("precision", precision), ("f1", f1)):
        assert found[f"macro_{name}"] == pytest.approx(wanted[:4].mean(), abs=1e-12)
    assert found["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(truth, guess), abs=1e-12)
    wrong = [((truth == c) == (guess == c)).mean() for c in names]
    assert found["macro_accuracy"] == pytest.approx(np.mean(wrong[:4]), abs=1e-12)
    assert found["per_class"]["recall"][4] is None


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
