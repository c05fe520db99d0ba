"""Images a second of the data pipeline alone: ``python -m benchmarks.data [SOURCE ...] [--threads 1 2 4] [--tiny]``.

For each source (a folder, tar shards; by default JPEGs of 500 x 375 pixels that are made for the purpose, as a
folder and as tar shards) and number of threads, and on a GPU for each `hw_decoder_load`: images a second, and how
many threads would feed a step of the speed given by ``--needs``. Writes `benchmarks/results/data.json`, on a CPU
`data_cpu.json` with ratios to the first row only.
"""

import argparse
import math
import os
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks import record
from fastalign.data.loader import Loader
from fastalign.data.sources import open_source
from fastalign.data.transforms import Transform

PIXELS = (500, 375)


def make_images(folder: Path, count: int) -> list[str]:
    """A folder of JPEGs with the size and the compressibility of photographs, and the same as a tar."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for index in range(count):
        # Smooth shapes with some noise: about 50 kB at quality 90, as ImageNet's are.
        small = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8))
        pixels = np.asarray(small.resize(PIXELS, Image.Resampling.BICUBIC), np.int16)
        pixels = np.clip(pixels + rng.normal(0, 6, pixels.shape), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{index:06}.jpg", quality=90)
    with tarfile.open(folder / "shard.tar", "w") as shard:
        for path in sorted((folder / "images").iterdir()):
            shard.add(path, path.name)
    return [str(folder / "images"), str(folder / "shard.tar")]


def measure(source: str, threads: int, hw_decoder_load: float, batch: int, batches: int) -> float:
    """Images a second, after the first batches have filled the pipeline."""
    loader = Loader(
        open_source(source),
        Transform(size=(224, 224), mean=(0.5,) * 3, std=(0.5,) * 3, crop="rkrc"),
        batch_size=batch,
        device="cuda" if torch.cuda.is_available() else "cpu",
        threads=threads,
        hw_decoder_load=hw_decoder_load,
    )
    try:
        warm_up, seen, started = 3, 0, 0.0
        for epoch in range(1_000):
            for _ in loader.batches(epoch):
                if seen == warm_up:
                    _wait()
                    started = time.perf_counter()
                seen += 1
                if seen > warm_up + batches:
                    _wait()
                    return batch * batches / (time.perf_counter() - started)
    finally:
        loader.close()
    raise RuntimeError("the source gives no batches")


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main(arguments: list[str] | None = None) -> list[dict]:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="*", help="folders of images or tar shards; default: made for it")
    parser.add_argument("--threads", nargs="+", type=int, help="default 1, 2, 4... up to the cores")
    parser.add_argument("--needs", type=float, help="images a second that a training step takes")
    parser.add_argument("--tiny", action="store_true", help="a few images: checks that it runs")
    options = parser.parse_args(arguments)
    cores, cuda = os.cpu_count() or 1, torch.cuda.is_available()
    threads = options.threads or sorted({*(2**n for n in range(int(math.log2(cores)) + 1)), cores})
    batch, batches, count = (4, 2, 16) if options.tiny else (128, 40 if cuda else 8, 4096 if cuda else 1024)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for source in options.sources or make_images(Path(folder), count):
            for number in threads[:1] if options.tiny else threads:
                for load in (0.0, 0.5, 0.9, 1.0) if cuda else (0.0,):
                    rate = measure(source, number, load, batch, batches)
                    kind = "tar" if source.endswith(".tar") else "folder"
                    row = {
                        "source": kind,
                        "threads": number,
                        "hw_decoder_load": load,
                        "images_per_second": rate,
                    }
                    if options.needs:
                        row["threads_needed"] = math.ceil(options.needs / rate * number)
                    rows.append(row)
                    print(row, flush=True)
    if not options.tiny and cuda:
        record.write("data", rows)
    elif not options.tiny:
        first = rows[0]["images_per_second"]
        ratios = [{**row, "ratio": row["images_per_second"] / first} for row in rows]
        for row in ratios:
            del row["images_per_second"]
        record.write("data_cpu", ratios)
    return rows


if __name__ == "__main__":
    main()
