"""Figures of a classifier: by hand and against scikit-learn."""

import math

import numpy as np
import pytest
import torch
from sklearn import metrics

from fastalign.evaluation.image_scores import Tally, select, summarise
from fastalign.evaluation.images import alone
from fastalign.training.metrics import mean_and_spread


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
