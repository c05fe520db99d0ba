"""Philox against the published known answers, and the draws' purity and distribution."""

import numpy as np
import pytest
import torch
from scipy import stats

from fastalign.utils.random import Stream, permutation, philox, random_uniform, random_words

# Known answers of Random123's kat_vectors for philox4x32-10: counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_philox_gives_the_published_answers(counter, key, result):
    words = [torch.tensor([int(word, 16)]) for word in counter.split()]
    found = philox(tuple(words), tuple(int(word, 16) for word in key.split()))
    assert [f"{word.item():08x}" for word in found] == result.split()


def test_a_draw_depends_on_seed_stream_epoch_and_its_own_id():
    ids, base = torch.tensor([7, 2**40 + 3, 0]), {"seed": 1, "stream": Stream.MASKS, "epoch": 2}
    together = random_words(ids, 9, **base)
    assert len(together.unique(dim=0)) == 3
    for row, sample in enumerate(ids):
        assert torch.equal(random_words(sample[None], 9, **base)[0], together[row])
    for change in ({"seed": 2}, {"seed": 1 + 2**32}, {"stream": Stream.MIX}, {"epoch": 1}):
        assert not torch.equal(random_words(ids, 9, **{**base, **change}), together)


def test_uniform_draws_are_uniform():
    draws = random_uniform(torch.arange(20_000), 5, seed=0, stream=Stream.AUGMENT).numpy()
    assert draws.min() >= 0
    assert draws.max() < 1
    assert stats.kstest(draws.ravel(), "uniform").pvalue > 1e-3
    correlation = np.corrcoef(draws.T) - np.eye(5)
    assert np.abs(correlation).max() < 0.03


def test_permutation_is_global_and_changes_with_epoch_and_seed():
    draws = ((0, 0), (0, 0), (0, 1), (1, 0))
    first, *others = (permutation(1000, seed=seed, epoch=epoch).tolist() for seed, epoch in draws)
    assert [first == other for other in others] == [True, False, False]
    assert all(sorted(order) == list(range(1000)) for order in (first, *others))
