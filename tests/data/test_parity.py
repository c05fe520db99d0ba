"""The decoded, resized and cropped pixels against timm's transforms on PIL images."""

import numpy as np
import pytest
import torch
from timm.data import create_transform
from timm.data import transforms as timm_transforms
from torchvision.transforms import functional as vision

from fastalign.data.headers import read_size
from fastalign.data.pipeline import Decoder, Sample
from fastalign.data.transforms import Transform, geometry, normalize, reflect
from fastalign.utils.random import Stream, random_uniform
from tests.data_helpers import CLIP_MEAN, CLIP_STD, Scripted, decode, encode, photo

pytest.importorskip("nvidia.dali.fn")
FILES = {
    "astronaut 4:2:0": lambda: encode(photo("astronaut"), quality=75, subsampling=2),
    "astronaut 4:4:4": lambda: encode(photo("astronaut"), quality=95, subsampling=0),
    "coffee 4:2:2": lambda: encode(photo("coffee"), quality=85, subsampling=1),
    "chelsea odd 4:2:0": lambda: encode(photo("chelsea").crop((0, 0, 333, 251)), quality=60, subsampling=2),
    "rocket progressive": lambda: encode(photo("rocket"), quality=80, progressive=True),
    "rocket tall png": lambda: encode(photo("rocket").crop((100, 0, 300, 427)), "PNG"),
    "small, upsampled": lambda: encode(photo("coffee").resize((150, 97)), quality=90),
}


def dali_pixels(transform: Transform, files: list, ids: np.ndarray, seed=0, epoch=0) -> torch.Tensor:
    decoder = Decoder(transform, torch.device("cpu"), batch_size=len(files), num_threads=2)
    samples = [Sample(i, i, data, read_size(data)) for i, data in zip(ids.tolist(), files, strict=True)]
    decoder.submit(samples, seed=seed, epoch=epoch)
    ((pixels, sampling),) = decoder.collect()
    return reflect(pixels, sampling)


def levels(images: torch.Tensor, timm_output: list) -> np.ndarray:
    """Absolute differences in 8-bit levels, [B, h, w, 3]."""
    expected = np.stack([np.asarray(image) for image in timm_output]).astype(np.int64)
    return np.abs(images.numpy().astype(np.int64) - expected)


@pytest.mark.parametrize(
    ("size", "crop_pct", "interpolation"),
    [
        ((224, 224), 0.875, "bilinear"),
        ((224, 224), 1.0, "bicubic"),
        ((192, 256), 0.9, "bicubic"),
        ((256, 128), 0.9, "bicubic"),
    ],
)
def test_eval_matches_timm(size, crop_pct, interpolation):
    files = [make() for make in FILES.values()]
    mine = Transform(size, CLIP_MEAN, CLIP_STD, interpolation, crop_pct=crop_pct)
    theirs = create_transform(size, crop_pct=crop_pct, interpolation=interpolation, normalize=False)
    expected = [theirs(decode(data)).permute(1, 2, 0) for data in files]
    pixels = dali_pixels(mine, files, np.arange(len(files)))
    difference = levels(pixels, expected)
    # PIL rounds to 8 bits between its two passes, which costs about 0.13 levels; at the border of an image it
    # renormalizes the kernel where DALI repeats the border pixel.
    assert difference.mean(axis=(1, 2, 3)).max() < 0.25
    assert np.quantile(difference, 0.999) <= 2
    normalized = vision.normalize(pixels.permute(0, 3, 1, 2) / 255, CLIP_MEAN, CLIP_STD)
    torch.testing.assert_close(normalize(pixels, mine, torch.float32), normalized)


def timm_rkrc(data, transform: Transform, draws: list[float], monkeypatch):
    """draws: our row (interpolation, flip, zoom?, zoom, aspect?, aspect)."""
    kind, flip, zoomed, zoom, stretched, aspect = draws
    draws = [zoomed, zoom] if zoomed < 0.5 else [zoomed]
    draws += [stretched, aspect] if stretched < 0.5 else [stretched]
    monkeypatch.setattr(timm_transforms, "random", Scripted([*draws, kind]))
    resize = timm_transforms.ResizeKeepRatio(
        transform.size,
        interpolation="random",
        random_scale_prob=0.5,
        random_scale_range=transform.scale,
        random_scale_area=True,
        random_aspect_prob=0.5,
        random_aspect_range=transform.ratio,
    )
    image = timm_transforms.CenterCropOrPad(transform.size, padding_mode="reflect")(resize(decode(data)))
    return vision.hflip(image) if flip < transform.hflip else image


@pytest.mark.parametrize("size", [(224, 224), (160, 200)])
def test_rkrc_matches_timm(size, monkeypatch):
    files, ids = [make() for make in FILES.values()] * 4, np.arange(100, 128)
    mine = Transform(size, CLIP_MEAN, CLIP_STD, crop="rkrc", scale=(0.7, 1.0))
    draws = random_uniform(torch.from_numpy(ids), 6, seed=5, stream=Stream.GEOMETRY, epoch=3).tolist()
    expected = [timm_rkrc(data, mine, row, monkeypatch) for data, row in zip(files, draws, strict=True)]
    difference = levels(dali_pixels(mine, files, ids, seed=5, epoch=3), expected).mean(axis=(1, 2, 3))
    shapes = np.array([decode(data).size[::-1] for data in files])
    padded = geometry(mine, shapes, ids, seed=5, epoch=3).padded
    assert 2 <= len(padded) < 28
    assert {row[0] < 0.5 for row in draws} == {row[1] < 0.5 for row in draws} == {True, False}
    assert difference.max() < 0.25


def timm_rrc(data, transform: Transform, draws: list[float], monkeypatch):
    """draws: our row (interpolation, flip, y, x, 10 areas, 10 aspects)."""
    kind, flip, y, x = draws[:4]
    image = decode(data)

    class Tries(Scripted):
        def __init__(self):
            super().__init__([n for pair in zip(draws[4:14], draws[14:], strict=True) for n in pair])

        def randint(self, low, high):
            self.placed = not getattr(self, "placed", False)
            return low + int((y if self.placed else x) * (high - low + 1))

    monkeypatch.setattr(timm_transforms, "random", Tries())
    get = timm_transforms.RandomResizedCropAndInterpolation.get_params
    box = get(image, transform.scale, transform.ratio)
    mode = vision.InterpolationMode.BILINEAR if kind < 0.5 else vision.InterpolationMode.BICUBIC
    image = vision.resized_crop(image, *box, transform.size, mode)
    return (vision.hflip(image) if flip < transform.hflip else image), box


def test_rrc_matches_timm(monkeypatch):
    files, ids = [make() for make in FILES.values()] * 2, np.arange(14)
    # Wide ratios make tries fail, so that later tries are met too.
    mine = Transform((128, 96), CLIP_MEAN, CLIP_STD, crop="rrc", scale=(0.5, 1.0), ratio=(0.2, 5.0))
    draws = random_uniform(torch.from_numpy(ids), 24, seed=1, stream=Stream.GEOMETRY, epoch=0).tolist()
    made = [timm_rrc(data, mine, row, monkeypatch) for data, row in zip(files, draws, strict=True)]
    difference = levels(dali_pixels(mine, files, ids, seed=1), [image for image, _ in made])
    # torchvision cuts before it resizes, so its outermost pixels do not see their neighbours.
    assert difference[:, 6:-6, 6:-6].mean(axis=(1, 2, 3)).max() < 0.3
    assert difference.mean(axis=(1, 2, 3)).max() < 1.0


def test_rrc_falls_back_to_the_centre():
    mine = Transform((64, 64), CLIP_MEAN, CLIP_STD, crop="rrc", scale=(0.9, 1.0), hflip=0.0)
    made = geometry(mine, np.array([[100, 1000], [1000, 100]]), np.arange(2), seed=0, epoch=0)
    # The widest allowed crop of 100 x 1000 is 100 x round(100 * 4/3) = 133, from (1000 - 133) // 2 on.
    assert made.roi_start.tolist() == [[0, 433], [433, 0]]
    assert made.roi_end.tolist() == [[100, 566], [566, 100]]


def test_reflection_matches_numpy():
    mine = Transform((7, 9), CLIP_MEAN, CLIP_STD, crop="rkrc", scale=(4.0, 4.0), ratio=(0.9, 1.1))
    shapes = np.array([[70, 90], [30, 40], [500, 120], [9, 9]]).repeat(8, axis=0)
    sampling = geometry(mine, shapes, np.arange(32), seed=0, epoch=0)
    assert len(sampling.padded) > 8
    images = torch.randint(256, (32, 7, 9, 3), dtype=torch.uint8)
    filled = reflect(images, sampling)
    flipped = sampling.roi_start[:, 1] > sampling.roi_end[:, 1]
    assert 0 < flipped.sum() < 32
    for i in sampling.padded.tolist():
        low, high = sampling.roi_start[i].copy(), sampling.roi_end[i].copy()
        low[1], high[1] = sorted((low[1], high[1]))
        pixel = (high - low) / (7, 9)
        before = np.maximum(np.rint(-low / pixel), 0).astype(int)
        after = np.maximum(np.rint((high - shapes[i]) / pixel), 0).astype(int)
        image = images[i].numpy()[:, ::-1] if flipped[i] else images[i].numpy()
        valid = image[before[0] : 7 - after[0], before[1] : 9 - after[1]]
        expected = np.pad(valid, [(before[0], after[0]), (before[1], after[1]), (0, 0)], mode="reflect")
        expected = expected[:, ::-1] if flipped[i] else expected
        np.testing.assert_array_equal(filled[i].numpy(), expected)
