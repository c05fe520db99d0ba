"""How patch heads are trained and selected, against plain loops."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.nn import functional

from fastalign.evaluation import patches
from fastalign.evaluation.heads import make_patch_head
from fastalign.evaluation.options import Plan, Recipe
from fastalign.evaluation.patches import Task, evaluate_head, fit_head, probe
from fastalign.evaluation.results import patch_loss
from tests.evaluation.helpers import CPU, SINGLE, SPEC, patch_features


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


def test_the_loss_of_a_split_is_over_all_patches(monkeypatch):
    """Not a mean over batches, one of which has void patches only."""
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


def test_a_batch_of_void_patches_has_no_gradient():
    logits = torch.randn(2, 3, 4, requires_grad=True)
    loss = patch_loss(logits, torch.full((2, 3), -1))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_the_test_split_is_read_last(monkeypatch):
    """And once for each head, when its epoch has been selected."""
    looked, recipe = [], Recipe(epochs=3, batch_size=8)
    splits = {name: patch_features(16, seed) for seed, name in enumerate(("train", "val", "test"))}
    for name, split in splits.items():

        def spy(rows, kind, name=name, original=split.labels):
            looked.append(name)
            return original(rows, kind)

        object.__setattr__(split, "labels", spy)
    monkeypatch.setattr(patches, "read_patch_features", lambda vit, data, *_, **__: splits[data[0]])
    backbone = SimpleNamespace(spec=SPEC)
    data = {name: [name] * 16 for name in splits}
    rows = probe({"m": backbone}, data, [Plan(heads=("linear",), seeds=(0, 1), recipe=recipe)], SINGLE)
    assert "".join(name[1] for name in looked) == 2 * (3 * "rra" + "e")
    assert [row["seed"] for row in rows] == [0, 1]
