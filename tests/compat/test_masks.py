"""The samplers of masks, the mask layer, and attention under a mask."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

import fastalign.compat.locality_alignment as la
from tests import truth
from tests.numerics import randomise, relative_error


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("null", [False, True])
@pytest.mark.parametrize("kind", ["Uniform", "Bernoulli", "Blockwise"])
def test_layout_of_masks(kind, pair, null):
    sampler = getattr(la, f"{kind}MaskSampler")(49, antithetical_sampling=pair, include_null=null)
    copies = 1 + pair + null
    for seed in (None, 5):
        masks = sampler(4, seed=seed)
        assert masks.shape == (4 * copies, 49)
        assert masks.dtype == torch.float32
        sample = masks[::copies]
        assert set(sample.unique().tolist()) <= {0, 1}
        assert len({tuple(row) for row in sample.tolist()}) > 1
        if pair:
            assert torch.equal(masks[1::copies], 1 - sample)
        if null:
            assert (masks[copies - 1 :: copies] == 1).all()


def test_seeded_masks_are_numpys_draws():
    draws = np.random.default_rng(7).uniform(size=(6, 10))
    wanted = [[float(value > row[0]) for value in row[1:]] for row in draws[::3]]
    assert la.UniformMaskSampler(9)(2, seed=7)[::3].tolist() == wanted
    draws = np.random.default_rng(7).uniform(size=(4, 9))
    wanted = [[float(value < 0.25) for value in row] for row in draws[::2]]
    assert la.BernoulliMaskSampler(9, 0.25, include_null=False)(2, seed=7)[::2].tolist() == wanted


def test_masks_without_a_seed_follow_torchs():
    def draw(seed):
        torch.manual_seed(seed)
        sampler = la.UniformMaskSampler(64)
        return torch.stack([sampler(3), sampler(3)])

    first, again, other = draw(1), draw(1), draw(2)
    assert torch.equal(first, again)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


def test_mask_layer():
    image = torch.randn(1, 3, 62, 62, dtype=torch.float64)
    mask = torch.tensor([[1.0, 0, 0, 1, 1, 0, 1, 1, 0]], dtype=torch.float64)
    found = la.MaskLayer(62, 20)(image, mask)[0]
    wanted = truth.blank_pixels(image[0], mask[0], 20)
    wanted[:, 60:], wanted[:, :, 60:] = 0, 0  # no patch reads the remainder
    assert torch.equal(found, wanted)
    assert torch.equal(la.MaskLayer(60, 20)(image[..., :60, :60], mask / 2)[0], wanted[:, :60, :60] / 2)


def test_transformer_pooling():
    torch.manual_seed(0)
    head = la.TransformerPooling(32, 4, 5, 2).double()
    randomise(head)
    assert {key.partition(".")[0] for key in head.state_dict()} == {"pos_embed", "blocks", "norm"}
    blocks = [timm.models.vision_transformer.Block(32, 4, norm_layer=nn.LayerNorm).double() for _ in range(2)]
    nn.Sequential(*blocks).load_state_dict(head.blocks.state_dict())
    x = torch.randn(3, 5, 32, dtype=torch.float64)
    wanted = head.norm(blocks[1](blocks[0](x + head.pos_embed))).mean(1)
    assert relative_error(head(x), wanted) < 1e-12
