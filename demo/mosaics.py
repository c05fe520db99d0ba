"""Renders the demo's data: mosaics of ten photographs that scikit-image and scikit-learn ship in their wheels.

A picture is a Voronoi mosaic of one to four regions, each filled with a crop of another photograph, which is the
class; the map of regions is kept as the segmentation label, so that a probe can ask what a patch contains.
Training crops come from the left 60 % of every photograph, validation crops from the next 20 %, test crops from the
right 20 %: whatever is chosen on one split has not seen the next. A picture is a pure function of (seed, split,
index): any number of workers renders the same bytes.

    python -m demo.mosaics [--out demo/data] [--train 12000] [--val 2000] [--test 2000] [--seed 0] [--size 96]
"""

import argparse
import csv
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
from pathlib import Path

import numpy as np
from PIL import Image

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
"""Counts up when the same settings come to mean other pictures, so that old data is rendered again."""

_PARTS = {"train": (0.0, 0.6), "val": (0.6, 0.8), "test": (0.8, 1.0)}
_CROP_SHARE = {"train": (0.25, 0.6), "val": (0.6, 0.95), "test": (0.6, 0.95)}
_PHOTO_SIDE = 512
_MIN_CONTRAST = 12.0
_TRIES = 4
_MIN_REGION = 0.05
_JPEG_QUALITY = 90


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What decides the pictures: how many of each split, the seed, and the side in pixels."""

    train: int = 12_000
    val: int = 2_000
    test: int = 2_000
    seed: int = 0
    size: int = 96

    @property
    def key(self) -> dict[str, int]:
        """What two renders must share to be the same data."""
        return {"recipe": RECIPE, **asdict(self)}

    def __post_init__(self):
        if min(self.train, self.val, self.test) < 1 or self.size < 16 or self.seed < 0:
            raise UserError("mosaics: --train, --val and --test start at 1, --size at 16, --seed at 0")


def photo_path(name: str) -> Path:
    """Where the wheel put a photograph; neither package is imported, so nothing can be downloaded."""
    package, file = PHOTOS[name]
    spec = find_spec(package)
    remedy = f"pip install {DISTRIBUTIONS[package]}"
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"mosaics: the package {package}, which ships the photograph {name}, is missing: {remedy}"
        )
    path = Path(spec.submodule_search_locations[0]) / file
    if not path.is_file():
        raise UserError(f"mosaics: {package} is installed but lacks {file}; try another version: {remedy}")
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


def part_bounds(width: int, split: str) -> tuple[int, int]:
    """Columns [first, past-the-last) of a photograph that a split may show, in pixels."""
    first, end = _PARTS[split]
    return int(width * first), int(width * end)


def crop_window(
    rng: np.random.Generator, width: int, height: int, split: str
) -> tuple[float, float, float, float]:
    """A random square inside a split's part of a photograph.

    The side is drawn from 0.25 to 0.6 (train) or 0.6 to 0.95 (val, test) of the short side of the part: the
    held-out parts are narrow, and their crops must show things at a size that training shows them too.

    Args:
        rng: where the draws come from.
        width: of the photograph, pixels.
        height: of the photograph, pixels.
        split: one of SPLITS.

    Returns:
        (left, top, right, bottom) in pixels, fractions allowed.
    """
    first, end = part_bounds(width, split)
    side = rng.uniform(*_CROP_SHARE[split]) * min(end - first, height)
    left = rng.uniform(first, end - side)
    top = rng.uniform(0, height - side)
    return left, top, min(left + side, end), min(top + side, height)


def draw_regions(rng: np.random.Generator, size: int) -> np.ndarray:
    """A Voronoi diagram of 1 to 4 random sites, none of whose cells covers less than 5 % of the picture.

    Returns:
        [size, size] int64, the region of each pixel, 0 to count - 1, each of which occurs.
    """
    count = int(rng.integers(1, 5))
    centres = np.arange(size) + 0.5
    while True:
        y, x = rng.uniform(0, size, (2, count, 1, 1))
        regions = ((centres[:, None] - y) ** 2 + (centres - x) ** 2).argmin(0)
        if np.bincount(regions.ravel(), minlength=count).min() >= _MIN_REGION * size * size:
            return regions


def draw_filling(rng: np.random.Generator, photo: Image.Image, split: str, size: int) -> np.ndarray:
    """One crop of a photograph: flipped half of the time, partly grey, brighter or darker.

    Returns:
        [size, size, 3] uint8.
    """
    # Blank sky belongs to no photograph: a few more tries where a crop is flat.
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
    # Colour alone must not name the photograph.
    share, gain = rng.uniform(0.0, 0.8), rng.uniform(0.6, 1.1)
    return ((colour + share * (grey - colour)) * gain).clip(0, 255).round().astype(np.uint8)


def draw_mosaic(
    photos: tuple[Image.Image, ...], seed: int, split: str, index: int, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """One picture and its segmentation, a pure function of (seed, split, index) and the size.

    Returns:
        The picture, [size, size, 3] uint8, and the class of each pixel, [size, size] uint8.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    regions = draw_regions(rng, size)
    classes = rng.permutation(len(photos))[: regions.max() + 1]
    picture = np.empty((size, size, 3), np.uint8)
    for region, label in enumerate(classes):
        inside = regions == region
        picture[inside] = draw_filling(rng, photos[label], split, size)[inside]
    return picture, classes[regions].astype(np.uint8)


def image_label(labels: np.ndarray) -> int:
    """The class that covers most of the picture; of equals the one with the lower id."""
    return int(np.bincount(labels.ravel(), minlength=len(CLASSES)).argmax())


def _write_one(folder: str, settings: Settings, job: tuple[str, int]) -> int:
    """Renders and writes one picture of the job (split, index); returns its image-level label."""
    split, index = job
    picture, labels = draw_mosaic(load_photos(), settings.seed, split, index, settings.size)
    base = Path(folder, split)
    Image.fromarray(picture).save(base / "images" / f"{index:05d}.jpg", quality=_JPEG_QUALITY)
    Image.fromarray(labels).save(base / "labels" / f"{index:05d}.png")
    return image_label(labels)


def _write_all(folder: Path, settings: Settings, workers: int) -> None:
    """Writes the splits and their labels.csv into an empty folder."""
    for split in SPLITS:
        for kind in ("images", "labels"):
            (folder / split / kind).mkdir(parents=True)
    jobs = [(split, index) for split in SPLITS for index in range(getattr(settings, split))]
    write = partial(_write_one, str(folder), settings)
    if workers > 1:
        # spawn, because a fork of a process that runs threads (torch's, say) may hang.
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            labels = pool.map(write, jobs, chunksize=100)
    else:
        labels = [write(job) for job in jobs]
    for split in SPLITS:
        with (folder / split / "images" / "labels.csv").open("w", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["name", "label"])
            for (owner, index), label in zip(jobs, labels, strict=True):
                if owner == split:
                    table.writerow([f"{index:05d}.jpg", label])


def _rendered_key(folder: Path) -> dict | None:
    """The key that a folder was rendered with; None where it is no such folder."""
    try:
        return json.loads((folder / "mosaics.json").read_text())["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _manifest(settings: Settings) -> str:
    """The text of mosaics.json."""
    packages = ["numpy", "pillow", *DISTRIBUTIONS.values()]
    versions = {package: importlib.metadata.version(package) for package in packages}
    entries = {"settings": settings.key, "classes": list(CLASSES), "versions": versions}
    return json.dumps(entries, indent=1) + "\n"


def render(out: Path, settings: Settings, workers: int = 2) -> bool:
    """Renders the mosaics into a folder, which appears only when complete.

    Args:
        out: the folder; other mosaics in it are replaced, anything else is refused.
        settings: what to render.
        workers: processes; the result is the same for any number.

    Returns:
        Whether anything was rendered; False where the same settings were there already.
    """
    found = _rendered_key(out)
    if found == settings.key:
        return False
    if found is None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"mosaics: --out {out} holds something else than mosaics; name another folder")
    for name in CLASSES:
        photo_path(name)  # here rather than in a worker, whose error would come with a long trace
    temporary, old = (out.with_name(f"{out.name}.{word}-{os.getpid()}") for word in ("partial", "old"))
    try:
        temporary.mkdir(parents=True)
        _write_all(temporary, settings, workers)
        (temporary / "mosaics.json").write_text(_manifest(settings))
        (temporary / "classes.txt").write_text("\n".join(CLASSES) + "\n")
        if out.exists():
            out.rename(old)
        temporary.rename(out)
    finally:
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)
    return True


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m demo.mosaics", description="Render the demo's mosaics.")
    parser.add_argument("--out", type=Path, default=Path("demo/data"), help="folder to write")
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--workers", type=int, default=2, help="processes; changes nothing but the time")
    args = parser.parse_args(argv)
    started = time.perf_counter()
    try:
        settings = Settings(**{name: getattr(args, name) for name in asdict(Settings())})
        rendered = render(args.out, settings, args.workers)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    verdict = f"rendered in {time.perf_counter() - started:.0f} s" if rendered else "already there"
    print(f"{args.out}: {settings.train} + {settings.val} + {settings.test} mosaics {verdict}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
