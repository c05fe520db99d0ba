"""Mask distributions: chi-square against their definitions, pairs, purity."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

import fastalign as fa

IDS = torch.arange(30_000)
DISTRIBUTIONS = [fa.UniformMasks, fa.BernoulliMasks, fa.BlockwiseMasks]


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize("complement", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_copies_are_sample_complement_full(kind, complement, full):
    masks = kind(complement=complement, full=full, seed=3)
    visible = masks(IDS[:50], 64)
    assert visible.shape == (50, 1 + complement + full, 64)
    assert visible.dtype == torch.bool
    assert masks.copies == visible.shape[1]
    plain = kind(complement=False, full=False, seed=3)(IDS[:50], 64)
    assert torch.equal(visible[:, :1], plain)
    if complement:
        assert torch.equal(visible[:, 1], ~visible[:, 0])
    if full:
        assert visible[:, -1].all()


def test_uniform_number_of_visible_patches_is_uniform_from_none_to_all():
    count = fa.UniformMasks(complement=False, full=False)(IDS, 16).sum(-1).flatten()
    observed = torch.bincount(count, minlength=17).numpy()
    assert stats.chisquare(observed).pvalue > 1e-3


def test_uniform_patches_are_exchangeable():
    visible = fa.UniformMasks(complement=False, full=False)(IDS, 25)[:, 0]
    share = visible.double().mean(0).numpy()
    assert np.abs(share - 0.5).max() < 4.5 * 0.5 / math.sqrt(len(IDS))
    # Given u, patches are independent: P(two visible) = E[(1 - u)^2] = 1/3.
    both = (visible[:, 3] & visible[:, 17]).double().mean().item()
    assert both == pytest.approx(1 / 3, abs=4 * math.sqrt(2 / 9 / len(IDS)))


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_bernoulli_count_is_binomial_with_the_visible_share(ratio):
    count = fa.BernoulliMasks(complement=False, full=False, ratio=ratio)(IDS, 12).sum(-1).flatten()
    observed = torch.bincount(count, minlength=13).numpy()
    expected = stats.binom.pmf(np.arange(13), 12, ratio) * len(IDS)
    if (rare := expected <= 5).any():
        observed = np.append(observed[~rare], observed[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    assert stats.chisquare(observed, expected).pvalue > 1e-3


def simulated_blockwise(count: int, side: int, ratio: float) -> np.ndarray:
    """The published procedure, one rectangle at a time, with numpy's generator."""
    rng, masks = np.random.default_rng(0), np.zeros((count, side, side), bool)
    for mask in masks:
        while mask.mean() < ratio:
            size = rng.integers(16, int(ratio * side * side))
            aspect = rng.uniform(0.3, 1 / 0.3)
            height = min(int(math.sqrt(size / aspect)), side)
            width = min(int(size / height), side)
            top, left = rng.integers(0, side - height + 1), rng.integers(0, side - width + 1)
            mask[top : top + height, left : left + width] = True
    return masks.reshape(count, -1)


@pytest.mark.parametrize("side", [8, 14])
def test_blockwise_has_the_distribution_of_the_published_procedure(side):
    visible = fa.BlockwiseMasks(complement=False, full=False)(IDS[:6000], side * side)[:, 0].numpy()
    truth = simulated_blockwise(6000, side, 0.4)
    assert visible.sum(1).min() >= 0.4 * side * side
    edges = np.quantile(truth.sum(1), np.linspace(0, 1, 9))[1:-1]
    table = [
        np.bincount(np.digitize(part.sum(1), np.unique(edges)), minlength=8) for part in (visible, truth)
    ]
    table = np.array(table)[:, np.sum(table, axis=0) > 0]
    assert stats.chi2_contingency(table).pvalue > 1e-3
    difference = visible.mean(0) - truth.mean(0)
    assert np.abs(difference).max() < 4.5 * math.sqrt(0.5 / 6000)
    if side == 14:
        assert visible.mean() == pytest.approx(0.49, abs=0.01)


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_a_mask_is_a_pure_function_of_seed_epoch_and_id(kind):
    masks = kind(seed=11)
    ids = torch.tensor([5, 900_000_000_000, 0, 17])
    together = masks(ids, 49, epoch=3)
    assert torch.equal(together, kind(seed=11)(ids, 49, epoch=3))
    assert torch.equal(together.flip(0), masks(ids.flip(0), 49, epoch=3))
    for row in range(4):
        assert torch.equal(masks(ids[row : row + 1], 49, epoch=3)[0], together[row])
    assert not torch.equal(together, masks(ids, 49, epoch=4))
    assert not torch.equal(together, kind(seed=12)(ids, 49, epoch=3))


def test_masks_of_ids_are_independent():
    visible = fa.BernoulliMasks(complement=False, full=False)(IDS, 4)[:, 0].double().numpy()
    assert abs(np.corrcoef(visible[:-1, 0], visible[1:, 0])[0, 1]) < 0.03


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: fa.BernoulliMasks(ratio=1.5), "ratio"),
        (lambda: fa.BlockwiseMasks(ratio=0.0), "ratio"),
        (lambda: fa.BlockwiseMasks()(IDS[:2], 200), "square"),
    ],
)
def test_bad_arguments_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
