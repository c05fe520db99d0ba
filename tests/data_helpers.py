"""Real photographs, encoded in many ways, for the data tests."""

import io
import os
import tarfile
import time
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastalign.data.loader import Batch, Loader
from fastalign.data.sources import open_source
from fastalign.data.transforms import Transform
from fastalign.utils.errors import UserError

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@cache
def photo(name: str) -> Image.Image:
    """A photograph that comes inside scikit-image: astronaut, coffee, chelsea, rocket or camera (grey)."""
    from skimage import data

    return Image.fromarray(getattr(data, name)())


def encode(image: Image.Image, kind: str = "JPEG", **options) -> np.ndarray:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return np.frombuffer(buffer.getvalue(), dtype=np.uint8)


def decode(data: np.ndarray) -> Image.Image:
    return Image.open(io.BytesIO(data.tobytes())).convert("RGB")


def small_photos(count: int, seed: int = 0) -> list[np.ndarray]:
    """Different crops of the photographs as JPEG, 60 to 120 pixels a side."""
    draw = np.random.default_rng(seed)
    made = []
    for i in range(count):
        whole = photo(("astronaut", "coffee", "chelsea", "rocket")[i % 4])
        width, height = (int(n) for n in draw.integers(60, 120, 2))
        left, top = int(draw.integers(whole.width - width)), int(draw.integers(whole.height - height))
        made.append(encode(whole.crop((left, top, left + width, top + height)), quality=85))
    return made


def write_folder(root: Path, files: dict[str, np.ndarray]) -> Path:
    """Writes files and makes every folder look old enough to be cached."""
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.tobytes())
    age(root)
    return root


def age(root: Path, seconds: float = 60) -> None:
    then = time.time() - seconds
    for path in [root, *root.rglob("*")]:
        os.utime(path, (then, then), follow_symlinks=False)


class Scripted:
    """Stands in for the module `random` inside timm: hands out given numbers in the order of the calls."""

    def __init__(self, numbers: list[float]):
        self.numbers = list(numbers)

    def random(self) -> float:
        return self.numbers.pop(0)

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.numbers.pop(0)

    def randint(self, low: int, high: int) -> int:
        return low + int(self.numbers.pop(0) * (high - low + 1))

    def choice(self, options):
        return options[int(self.numbers.pop(0) * len(options))]


def write_tar(path: Path, members: list[tuple[str, np.ndarray]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(bytes(data)))
    age(path.parent)
    return path


def shards(root: Path, count: int = 3, each: int = 4) -> list[np.ndarray]:
    """Writes 000.tar, 001.tar, ... with a picture and a json a sample; returns the pictures."""
    photos = small_photos(count * each)
    for s in range(count):
        members = []
        for i in range(each):
            members += [(f"{s}{i:03d}.jpg", photos[s * each + i]), (f"{s}{i:03d}.json", b"{}")]
        write_tar(root / f"{s:03d}.tar", members)
    return photos


TRAIN = Transform(
    (32, 32), CLIP_MEAN, CLIP_STD, crop="rkrc", randaugment="rand-m9-mstd0.5-inc1", color_jitter=0.2
)
EVAL = Transform((32, 32), CLIP_MEAN, CLIP_STD)


HAS_DALI = find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None
needs_dali = pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed")


def count_calls(monkeypatch, module, name: str) -> list:
    """The first arguments of all calls of a module's function, from now on."""
    counted, original = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda first: counted.append(first) or original(first))
    return counted


def names_of(source) -> list[str]:
    return [source.name(index) for index in range(len(source))]


def message(spec) -> str:
    """The one line with which a source is refused."""
    with pytest.raises(UserError) as caught:
        open_source(str(spec))
    text = str(caught.value)
    assert "\n" not in text
    return text


def batches_of(source, transform, *, start=0, epoch=0, **options) -> list[Batch]:
    """An epoch's batches, of a loader with the options."""
    loader = Loader(source, transform, device="cpu", threads=2, **options)
    batches = list(loader.batches(epoch, start))
    loader.close()
    return batches
