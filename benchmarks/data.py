"""The data pipeline against a torch DataLoader: ``python -m benchmarks.data [FOLDER] [--threads 1 2 4] [--tiny]``.

The DataLoader decodes with Pillow and transforms with timm. Both read the same JPEGs (of FOLDER; by default
generated, 500 x 375 pixels), crop, flip and normalize alike, run on the same number of cores with as many threads
or workers, and deliver batches on the training device. They take turns; the ratio is the median of the rounds.
Writes `benchmarks/results/data.json`, on a CPU `data_cpu.json` with ratios only.
"""

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, features
from PIL import __version__ as pillow_version
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks import record
from benchmarks.timing import in_turns, wait
from fastalign.data.loader import Loader
from fastalign.data.sources import open_source
from fastalign.data.transforms import Transform

PIXELS = (500, 375)
SIZE, CROP = 224, "rkrc"
HALF = (0.5,) * 3
TRANSFORM = {"scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3), "hflip": 0.5, "mean": HALF, "std": HALF}


def make_images(folder: Path, count: int) -> Path:
    """A folder of JPEGs with the size and the compressibility of photographs."""
    rng = np.random.default_rng(0)
    for index in range(count):
        # Smooth shapes with some noise: about 50 kB at quality 90, as ImageNet's are.
        small = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8))
        pixels = np.asarray(small.resize(PIXELS, Image.Resampling.BICUBIC), np.int16)
        pixels = np.clip(pixels + rng.normal(0, 6, pixels.shape), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:06}.jpg", quality=90)
    return folder


class Images(Dataset):
    """JPEGs read with Pillow, as torchvision's ImageFolder reads them."""

    def __init__(self, paths: list[Path], crop: str):
        self.paths = paths
        options = {"train_crop_mode": crop, "interpolation": "random", "color_jitter": None}
        self.transform = create_transform(SIZE, is_training=True, **options, **TRANSFORM)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.paths[index]) as image:
            return self.transform(image.convert("RGB"))


def plain(folder: Path, crop: str, batch: int, threads: int, device: torch.device) -> Iterator[Tensor]:
    """Batches of a DataLoader with one worker process per thread, epoch after epoch."""
    loader = DataLoader(
        Images(sorted(folder.rglob("*.jpg")), crop), batch, shuffle=True, drop_last=True, num_workers=threads,
        persistent_workers=True, pin_memory=device.type == "cuda",
    )  # fmt: skip
    while True:
        for images in loader:
            yield images.to(device, non_blocking=True)


def ours(folder: Path, crop: str, batch: int, threads: int, device: torch.device) -> Iterator[Tensor]:
    """Batches of our loader, epoch after epoch."""
    source, transform = open_source(str(folder)), Transform(size=(SIZE, SIZE), crop=crop, **TRANSFORM)
    loader = Loader(source, transform, batch_size=batch, device=device, threads=threads)
    with closing(loader):
        for epoch in itertools.count():
            for each in loader.batches(epoch):
                yield each.images


@contextmanager
def cores(count: int) -> Iterator[None]:
    """Restrict this process and its children to some of its cores."""
    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, sorted(before)[:count])
    torch.set_num_threads(count)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
        torch.set_num_threads(threads)


def rate(batches: Iterator[Tensor], threads: int, count: int, device: torch.device) -> float:
    """Images per second over `count` batches per thread; workers finish together, so whole turns are counted."""
    with closing(batches):
        for _ in range(2 * threads + 2):  # while workers start
            images = next(batches)
        wait(device.type)
        started = time.perf_counter()
        for _ in range(threads * count):
            images = next(batches)
        wait(device.type)
        return len(images) * threads * count / (time.perf_counter() - started)


def measure(folder: Path, threads: int, sizes: tuple[int, int, int]) -> dict:
    """A row; the two sides take turns.

    `threads` are cores, our threads, and workers of the DataLoader; `sizes` are images per batch, batches per thread
    and round, and rounds.
    """
    batch, count, rounds = sizes
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    common = (folder, CROP, batch, threads, device)
    found = {"ours": [], "torch": []}
    with cores(threads):
        for side in in_turns(["ours", "torch"], rounds):
            batches = ours(*common) if side == "ours" else plain(*common)
            found[side].append(rate(batches, threads, count, device))
    ratios = [left / right for left, right in zip(found["ours"], found["torch"], strict=True)]
    row = {"crop": CROP, "threads": threads, "ratio": statistics.median(ratios), "ratios": ratios}
    if device.type == "cuda":
        row |= {f"{side}_images_per_second": statistics.median(each) for side, each in found.items()}
    return row


def main(arguments: list[str] | None = None) -> list[dict]:
    """Measure, print, write."""
    cuda, available = torch.cuda.is_available(), len(os.sched_getaffinity(0))
    parser = record.parser("data", __doc__, "a few images")
    parser.add_argument("folder", nargs="?", type=Path, help="JPEGs; generated by default")
    parser.add_argument("--threads", nargs="+", type=int, help="default 1, 2, 4... up to the cores")
    options = parser.parse_args(arguments)
    powers = [2**n for n in range(available.bit_length()) if 2**n < available]
    threads = [1] if options.tiny else options.threads or [*powers, available]
    if max(threads) > available:
        parser.error(f"--threads {max(threads)}: this process has {available} cores")
    sizes = (4, 2, 1) if options.tiny else (128, 10, 5) if cuda else (32, 8, 7)
    facts = {"pillow": pillow_version, "libjpeg_turbo": features.check_feature("libjpeg_turbo")}
    facts |= {"batch": sizes[0], "batches_a_thread_and_round": sizes[1], "cores": available}
    rows = []
    with tempfile.TemporaryDirectory() as made:
        folder = options.folder or make_images(Path(made), 32 if options.tiny else 4096 if cuda else 1024)
        for number in threads:
            rows.append(measure(folder, number, sizes))
            spread = f"{min(rows[-1]['ratios']):.2f} to {max(rows[-1]['ratios']):.2f}"
            print(f"{number} threads: {rows[-1]['ratio']:.2f}x the DataLoader ({spread})", flush=True)
            if not options.tiny:
                record.write("data" if cuda else "data_cpu", rows, facts)
    return rows


if __name__ == "__main__":
    main()
