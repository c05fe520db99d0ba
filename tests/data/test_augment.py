"""Colour jitter and RandAugment against PIL and timm, mixup and cutmix against timm and their definitions."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from timm.data import auto_augment
from timm.data.mixup import rand_bbox

from fastalign.data.augment import augment, color_jitter, cut_box, mix, rand_augment
from fastalign.data.transforms import Transform
from tests.data_helpers import CLIP_MEAN, CLIP_STD, Scripted, photo

FILL = (122, 116, 104)
OPS = [op.name for op in auto_augment.rand_augment_transform("rand").ops]
GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")


def planes(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def both(image, name, magnitude, increasing, negative, bicubic=False):
    """The pixels that we and timm make of an image with one operation."""
    if increasing and f"{name}Increasing" in auto_augment.NAME_TO_OP:
        name = f"{name}Increasing"
    hparams = {"img_mean": FILL, "interpolation": Image.Resampling.BILINEAR}
    op = auto_augment.AugmentOp(name, prob=1.0, magnitude=magnitude, hparams=hparams)
    draws = [0, 0, 0, 0, 0.1 if negative else 0.9, 0.1 if bicubic else 0.9]
    made = rand_augment(planes(image), auto_augment.RandAugment([op], 1), draws)
    # timm negates if its draw is above 0.5.
    auto_augment.random = Scripted([0.9 if negative else 0.1])
    return made, planes(op(image))


@pytest.mark.parametrize("name", OPS)
def test_ops_match_timm(name, monkeypatch):
    monkeypatch.setattr(auto_augment, "random", None)
    images = [photo("chelsea").crop((100, 60, 196, 140)), photo("rocket").crop((200, 100, 280, 196))]
    for image in (*images, Image.new("RGB", (40, 32), (10, 200, 30))):
        for options in ((9, True, False), (4.3, True, True), (7, False, True), (0, True, False)):
            made, expected = both(image, name, *options)
            assert made.dtype == torch.uint8
            difference = (made.int() - expected.int()).abs()
            # Only sampling between pixels is not exact.
            limit = 1 if name in GEOMETRIC else 0
            assert difference.max() <= limit or (difference > 1).float().mean() < 2e-3, options


def test_bicubic_sampling_is_close_to_bilinear():
    image = photo("astronaut").crop((100, 50, 220, 170))
    smooth, sharp = (both(image, "Rotate", 5.3, True, False, bicubic)[0] for bicubic in (False, True))
    assert 0 < (smooth.float() - sharp.float()).abs().mean() < 4


def test_layers_use_their_draws():
    image, policy = (
        planes(photo("chelsea").crop((100, 60, 196, 140))),
        auto_augment.rand_augment_transform("rand"),
    )
    invert, posterize = (OPS.index(n) / len(OPS) + 0.01 for n in ("Invert", "Posterize"))
    skipped = [invert, 0.6, 0, 0, 0, 0, posterize, 0.5, 0, 0, 0, 0]
    assert torch.equal(rand_augment(image, policy, skipped), image)
    both = [invert, 0.4, 0, 0, 0, 0, posterize, 0.0, 0, 0, 0, 0]
    assert torch.equal(rand_augment(image, policy, both), (255 - image) & 0xF0)


def test_the_magnitude_of_a_policy_varies_as_timm_says():
    """mstd: normal, above 100 uniform in 0..m; mmax: upper bound, else 10. SolarizeAdd adds 110 times the level."""
    black, which = torch.zeros(3, 1, 1, dtype=torch.uint8), (OPS.index("SolarizeAdd") + 0.5) / len(OPS)
    one, two = 1 - math.exp(-0.5), 1 - math.exp(-2)  # standard deviations
    for text, draw, level in (
        ("m5", 0, 0.5),
        ("m5-mstd101", 0.3, 0.15),
        ("m5-mstd2", one, 0.7),
        ("m9-mstd2", two, 1.0),
        ("m9-mstd2-mmax12", two, 1.2),
    ):
        policy = auto_augment.rand_augment_transform(f"rand-n1-p1-{text}")
        made = rand_augment(black, policy, [which, 0.99, draw, 0, 0, 0])
        assert made.unique().item() == min(128, int(110 * level + 1e-6)), text


def test_an_image_is_augmented_by_its_id_alone_and_never_in_evaluation():
    photos = torch.stack(
        [planes(photo("coffee").crop((30 * i, 20 * i, 30 * i + 64, 20 * i + 48))) for i in range(6)]
    )
    images, ids, order = photos.permute(0, 2, 3, 1), np.array([5, 900, 2, 77, 13, 4]), [4, 0, 3]
    both = {"randaugment": "rand-m9-n3-mstd0.5-inc1", "color_jitter": 0.4}
    mine = Transform((48, 64), CLIP_MEAN, CLIP_STD, crop="rkrc", **both)
    made = augment(images, mine, ids, seed=3, epoch=2)
    assert (made.shape, made.dtype) == (images.shape, torch.uint8)
    assert torch.equal(augment(images[order], mine, ids[order], seed=3, epoch=2), made[order])
    for other in ({"seed": 3, "epoch": 3}, {"seed": 4, "epoch": 2}):
        assert not torch.equal(augment(images, mine, ids, **other), made)
    assert augment(images, replace(mine, crop="eval"), ids, seed=3, epoch=2) is images


def test_color_jitter_matches_pil():
    image = photo("chelsea").crop((50, 50, 150, 130))
    draws = np.array([[(k + 0.5) / 6, 0.2, 0.9, 0.6] for k in range(6)])
    made = color_jitter(planes(image).expand(6, -1, -1, -1), 0.4, draws)
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    orders = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    for row, order, result in zip(draws, orders, made, strict=True):
        expected = image
        for op in order:
            expected = enhancers[op](expected).enhance(0.6 + 0.8 * row[1 + op])
        assert (result.int() - planes(expected).int()).abs().max() <= 1


def test_cut_box_matches_timm(monkeypatch):
    for weight, center in [(0.1, (3, 90)), (0.5, (100, 40)), (0.97, (0, 0)), (0.0, (50, 50))]:
        centers = iter(center)
        monkeypatch.setattr(np.random, "randint", lambda *_, centers=centers, **__: next(centers))
        rows, columns = cut_box(120, 97, weight, center)
        expected = tuple(int(n) for n in rand_bbox((3, 120, 97), weight))
        assert (rows.start, rows.stop, columns.start, columns.stop) == expected


def test_mix_follows_its_definition():
    images, ids, draw = torch.randn(4, 3, 20, 20), np.array([8, 3, 5, 1]), {"seed": 0, "epoch": 1}
    assert mix(images, ids, mixup=0.0, cutmix=0.0, **draw) == (images, 1.0)
    made, weight = mix(images, ids, mixup=1.0, cutmix=0.0, **draw)
    torch.testing.assert_close(made, weight * images + (1 - weight) * images.flip(0))
    first_only = np.array([8, 0, 0, 0])
    assert torch.equal(mix(images, first_only, mixup=1.0, cutmix=0.0, **draw)[0], made)
    cut = 0
    for i in range(400):
        made, weight = mix(images, np.array([i]), mixup=0.5, cutmix=1.0, **draw)
        # Cutmix copies each pixel from some image, mixup none.
        if ((made == images) | (made == images.flip(0))).all():
            cut += 1
            assert (made == images).float().mean().item() == pytest.approx(weight, abs=1e-6)
    assert 160 < cut < 240
    own = [mix(images[:1], np.array([i]), mixup=0.5, cutmix=0.0, **draw)[1] for i in range(2000)]
    # Beta(a, a): mean 1/2, variance 1 / (4 (2a + 1)).
    assert abs(np.mean(own) - 0.5) < 0.03
    assert abs(np.var(own) - 0.125) < 0.01
