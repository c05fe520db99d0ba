"""Components, colours and similarity of patch features, against numpy, timm and loops by hand."""

import math

import numpy as np
import pytest
import torch

from fastalign.config import load_config
from fastalign.report import features
from fastalign.report.run import load_backbones, read_run
from fastalign.training.build import build_objective


def test_components_are_those_of_an_svd():
    tokens = np.random.default_rng(0).standard_normal((3, 20, 12)) * np.linspace(1, 3, 12) + 5
    values, share = features.principal_components(tokens)
    rows = tokens.reshape(60, 12) - tokens.reshape(60, 12).mean(0)
    left, singular, _ = np.linalg.svd(rows, full_matrices=False)
    wanted = left[:, :3] * singular[:3]
    np.testing.assert_allclose(np.abs(values.reshape(60, 3)), np.abs(wanted), atol=1e-10)
    assert ((values.reshape(60, 3) ** 3).sum(0) > 0).all()
    assert share == pytest.approx((singular[:3] ** 2).sum() / (singular**2).sum())


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
def test_shuffled_and_flipped_components_are_put_back(order):
    values = np.random.default_rng(1).standard_normal((2, 50, 3)) * [5, 2, 1]
    shuffled = 3 * values[..., list(order)] * [1, -1, -1] + 7
    signs = dict(zip(order, (1, -1, -1), strict=True))
    shift = 7 * np.array([signs[c] for c in range(3)])
    wanted = 3 * values + shift  # factor and shift stay, the shift with the sign
    np.testing.assert_allclose(features.match_components(shuffled, values), wanted, atol=1e-12)


def test_colours_go_from_the_first_percentile_to_the_last():
    values = np.stack([np.linspace(-1, 1, 101)] * 3, -1)[None]
    colours = features.component_colours(values)[0, :, 0]
    assert colours[0] == colours[1] == 0
    assert colours[99] == colours[100] == 255
    assert colours[50] == 128
    assert colours[25] == round(255 * 24 / 98)


def test_cosines_are_those_of_a_loop():
    tokens = np.random.default_rng(2).standard_normal((2, 6, 7))

    def cosine(a, b):
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))

    by_hand = [[[cosine(a, b) for b in picture] for a in picture] for picture in tokens]
    found = features.cosines(tokens, np.tile(np.arange(6), (2, 1)))
    np.testing.assert_allclose(found, by_hand, atol=1e-12)


def test_what_a_run_started_from_is_what_training_started_from(trained):
    """Random weights are drawn again; the encoder that training begins with is the truth."""
    found = load_backbones(read_run(trained))
    _, begun = build_objective(load_config(trained / "config.yaml"))
    wanted = begun.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in found["before"].state_dict().items())
    aligned = found["aligned"].state_dict()
    assert not torch.equal(aligned["blocks.0.attn.qkv.weight"], wanted["blocks.0.attn.qkv.weight"])
