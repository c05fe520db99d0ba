"""Renders the demo's data, mosaics of ten photographs: ``python -m demo.mosaics`` (demo/README.md describes them).

A picture is a pure function of (seed, split, index): any number of workers renders the same bytes.
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

from fastalign.training.command import run_command
from fastalign.utils.errors import UserError

PHOTOS = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "cat": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "galaxies": ("skimage", "data/hubble_deep_field.jpg"),
    "tissue": ("skimage", "data/ihc.png"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "retina": ("skimage", "data/retina.jpg"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "pagoda": ("sklearn", "datasets/images/china.jpg"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
}
"""Class name -> (package, file in it). The class id is the position, 0 to 9."""

CLASSES = tuple(PHOTOS)
SPLITS = ("train", "val", "test")
DISTRIBUTIONS = {"skimage": "scikit-image", "sklearn": "scikit-learn"}
RECIPE = 2
"""Increase it when the same settings give other pictures: old data is then rendered again."""

_PARTS = {"train": (0.0, 0.6), "val": (0.6, 0.8), "test": (0.8, 1.0)}
# Of the short side of the part. Val and test have narrow parts, and must show things at a size that training shows.
_CROP_SHARE = {"train": (0.25, 0.6), "val": (0.6, 0.95), "test": (0.6, 0.95)}
_PHOTO_SIDE = 512
_MIN_CONTRAST = 12.0
_TRIES = 4
_MIN_REGION = 0.05
_JPEG_QUALITY = 90


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """The number of pictures of each split, the seed, and the side in pixels."""

    train: int = 12_000
    val: int = 2_000
    test: int = 2_000
    seed: int = 0
    size: int = 96

    def __post_init__(self):
        if min(self.train, self.val, self.test) < 1 or self.size < 16 or self.seed < 0:
            raise UserError("mosaics: --train, --val and --test start at 1, --size at 16, --seed at 0")

    @property
    def key(self) -> dict[str, int]:
        """Two renders with the same key are the same data."""
        return {"recipe": RECIPE, **asdict(self)}


def photo_path(name: str) -> Path:
    """The file of a photograph in its installed package; neither package is imported, so nothing is downloaded."""
    package, file = PHOTOS[name]
    spec = find_spec(package)
    path = Path(spec.submodule_search_locations[0], file) if spec else Path()
    if not path.is_file():
        raise UserError(
            f"mosaics: the photograph {name} ({package}/{file}) is missing: pip install {DISTRIBUTIONS[package]}"
        )
    return path


@cache
def load_photos() -> tuple[Image.Image, ...]:
    """The ten photographs in class order, RGB, short side at most 512 pixels so that crops resize quickly."""
    photos = []
    for name in CLASSES:
        with Image.open(photo_path(name)) as file:
            photo = file.convert("RGB")
        shrink = _PHOTO_SIDE / min(photo.size)
        if shrink < 1:
            photo = photo.resize([round(side * shrink) for side in photo.size], Image.Resampling.LANCZOS)
        photos.append(photo)
    return tuple(photos)


def crop_window(rng: np.random.Generator, width: int, height: int, split: str) -> tuple[float, ...]:
    """A random square (left, top, right, bottom) inside a split's part of a photograph, in fractional pixels."""
    first, end = (int(width * share) for share in _PARTS[split])
    side = rng.uniform(*_CROP_SHARE[split]) * min(end - first, height)
    left = rng.uniform(first, end - side)
    top = rng.uniform(0, height - side)
    return left, top, min(left + side, end), min(top + side, height)


def draw_regions(rng: np.random.Generator, size: int) -> np.ndarray:
    """The region (0, 1, ...) of each pixel, [size, size] int64: a Voronoi diagram of 1 to 4 sites, none below 5 %."""
    count = int(rng.integers(1, 5))
    centres = np.arange(size) + 0.5
    while True:
        y, x = rng.uniform(0, size, (2, count, 1, 1))
        regions = ((centres[:, None] - y) ** 2 + (centres - x) ** 2).argmin(0)
        if np.bincount(regions.ravel(), minlength=count).min() >= _MIN_REGION * size * size:
            return regions


def draw_filling(rng: np.random.Generator, photo: Image.Image, split: str, size: int) -> np.ndarray:
    """One crop of a photograph, [size, size, 3] uint8: flipped half of the time, partly grey, brighter or darker."""
    # Blank sky belongs to no photograph: draw again, a few times, if a crop is flat.
    for _ in range(_TRIES):
        box = crop_window(rng, *photo.size, split)
        crop = photo.resize((size, size), Image.Resampling.BICUBIC, box=box)
        grey = np.asarray(crop.convert("L"), np.float32)
        if grey.std() >= _MIN_CONTRAST:
            break
    if rng.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        grey = grey[:, ::-1]
    colour, grey = np.asarray(crop, np.float32), grey[..., None]
    # Colour alone must not identify the photograph.
    share, gain = rng.uniform(0.0, 0.8), rng.uniform(0.6, 1.1)
    return ((colour + share * (grey - colour)) * gain).clip(0, 255).round().astype(np.uint8)


def draw_mosaic(seed: int, split: str, index: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture, [size, size, 3] uint8, and the class of each of its pixels, [size, size] uint8."""
    photos, rng = load_photos(), np.random.default_rng([seed, SPLITS.index(split), index])
    regions = draw_regions(rng, size)
    classes = rng.permutation(len(photos))[: regions.max() + 1]
    picture = np.empty((size, size, 3), np.uint8)
    for region, label in enumerate(classes):
        inside = regions == region
        picture[inside] = draw_filling(rng, photos[label], split, size)[inside]
    return picture, classes[regions].astype(np.uint8)


def image_label(labels: np.ndarray) -> int:
    """The class that covers most of the picture; the lower id of equal ones."""
    return int(np.bincount(labels.ravel(), minlength=len(CLASSES)).argmax())


def _write_picture(folder: Path, settings: Settings, job: tuple[str, int]) -> int:
    """Render and write one picture (split, index). Returns its image-level label."""
    split, index = job
    picture, labels = draw_mosaic(settings.seed, split, index, settings.size)
    Image.fromarray(picture).save(folder / split / f"images/{index:05d}.jpg", quality=_JPEG_QUALITY)
    Image.fromarray(labels).save(folder / split / f"labels/{index:05d}.png")
    return image_label(labels)


def _write_all(folder: Path, settings: Settings, workers: int) -> None:
    """Write the splits, with their labels.csv, and what is known of all into an empty folder."""
    for split, kind in product(SPLITS, ("images", "labels")):
        (folder / split / kind).mkdir(parents=True)
    jobs = [(split, index) for split in SPLITS for index in range(getattr(settings, split))]
    write = partial(_write_picture, folder, settings)
    if workers > 1:
        # spawn, because a fork of a process with threads (torch's, say) may hang
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            labels = pool.map(write, jobs, chunksize=100)
    else:
        labels = [write(job) for job in jobs]
    tables = dict.fromkeys(SPLITS, "name,label\n")
    for (split, index), label in zip(jobs, labels, strict=True):
        tables[split] += f"{index:05d}.jpg,{label}\n"
    for split, table in tables.items():
        (folder / split / "images/labels.csv").write_text(table)
    packages = ("numpy", "pillow", *DISTRIBUTIONS.values())
    versions = {name: importlib.metadata.version(name) for name in packages}
    facts = {"settings": settings.key, "classes": list(CLASSES), "versions": versions}
    (folder / "mosaics.json").write_text(json.dumps(facts, indent=1) + "\n")
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")


def render(out: Path, settings: Settings, workers: int = 2) -> bool:
    """Render the mosaics into a folder, which appears only when complete; other mosaics in it are replaced.

    Returns whether anything was rendered: False if the folder has the same settings. UserError if it holds something
    else.
    """
    facts = out / "mosaics.json"
    if facts.is_file():
        if json.loads(facts.read_text())["settings"] == settings.key:
            return False
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"mosaics: --out {out} holds something other than mosaics; name another folder")
    for name in CLASSES:
        photo_path(name)  # an error in a worker would come with a long trace
    temporary = out.with_name(f"{out.name}.partial-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        _write_all(temporary, settings, workers)
        shutil.rmtree(out, ignore_errors=True)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return True


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m demo.mosaics", description="Render the demo's mosaics.")
    parser.add_argument("--out", type=Path, default=Path("demo/data"), help="folder to write")
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--workers", type=int, default=2, help="processes; changes nothing but the time")
    options = vars(parser.parse_args(argv))
    out, workers = options.pop("out"), options.pop("workers")

    def body() -> None:
        started, settings = time.perf_counter(), Settings(**options)
        rendered = render(out, settings, workers)
        outcome = f"rendered in {time.perf_counter() - started:.0f} s" if rendered else "already there"
        print(f"{out}: {settings.train} + {settings.val} + {settings.test} mosaics {outcome}")

    return run_command(body)


if __name__ == "__main__":
    sys.exit(main())
