"""Images a second of the data pipeline alone: ``python -m benchmarks.data [SOURCE ...] [--threads 1 2 4] [--tiny]``.

For each source (a folder, tar shards; by default JPEGs of 500 x 375 pixels that are made for the purpose, as a
folder and as tar shards) and number of threads, and on a GPU for each `hw_decoder_load`: images a second, and how
many threads would feed a step of the speed given by ``--needs`` (default: the fastest of `benchmarks.step` here).
Writes `benchmarks/results/data.json` after every row, on a CPU `data_cpu.json` with ratios to the first row only.
"""

import argparse
import itertools
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


def threads_needed(needs: float, rates: dict[int, float]) -> tuple[int, bool]:
    """Threads that give so many images a second, and whether that is within what was measured.

    Between two measured numbers by a straight line, beyond the last at its rate a thread.
    """
    threads = sorted(rates)
    if rates[threads[0]] >= needs:
        return threads[0], True
    for low, high in itertools.pairwise(threads):
        if rates[high] >= needs:
            share = (needs - rates[low]) / (rates[high] - rates[low])
            return math.ceil(low + share * (high - low)), True
    return math.ceil(needs / rates[threads[-1]] * threads[-1]), False


def closing(rows: list[dict], needs: float) -> list[str]:
    """A line a source: how many threads feed a step, with the decoder that needs the fewest."""
    lines = []
    for source in dict.fromkeys(row["source"] for row in rows):
        found = []
        for load in dict.fromkeys(row["hw_decoder_load"] for row in rows):
            own = [row for row in rows if (row["source"], row["hw_decoder_load"]) == (source, load)]
            rates = {row["threads"]: row["images_per_second"] for row in own}
            if rates:
                found.append((*threads_needed(needs, rates), load, own[0]["decoder"]))
        threads, measured, load, decoder = min(found, key=lambda each: (each[0], not each[1]))
        how = decoder if "CPU" in decoder else f"{decoder}, hw_decoder_load {load:g}"
        more = "" if measured else ", more than were measured: by the rate a thread of the most"
        lines.append(f"{source}: to feed {needs:.0f} images/s you need {threads} threads ({how}{more})")
    return lines


def fastest_step() -> float | None:
    """Images a second of the fastest step that was measured on this GPU."""
    found = record.read("step")
    if not found or found["environment"]["gpu"] != record.environment()["gpu"]:
        return None
    return max((row["images_per_second"] for row in found["rows"] if "failed" not in row), default=None)


def rows_of(sources: list[str], threads: list[int], options: argparse.Namespace) -> list[dict]:
    """Measure and print; on a GPU write row by row, rows of earlier parts included."""
    cuda = torch.cuda.is_available()
    writing = cuda and not options.tiny
    batch, batches = (4, 2) if options.tiny else (128, 40 if cuda else 8)
    rows = []
    for source, number, load in itertools.product(sources, threads, (0.0, 0.5, 0.9, 1.0) if cuda else (0.0,)):
        # Two sources given by hand may be of one kind.
        kind = Path(source).name if options.sources else "tar" if source.endswith(".tar") else "folder"
        row = {"source": kind, "decoder": "DALI GPU mixed" if cuda else "DALI CPU", "threads": number}
        row |= {"hw_decoder_load": load, "images_per_second": measure(source, number, load, batch, batches)}
        if options.needs:
            row["threads_needed"] = math.ceil(options.needs / row["images_per_second"] * number)
        rows.append(row)
        print(row, flush=True)
        if writing:
            feeding = closing(rows, options.needs) if options.needs else []
            record.write("data", rows, {"needs": options.needs, "feeding": feeding})
    return rows


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
    if cuda and not options.needs:
        options.needs = fastest_step()
    count = 16 if options.tiny else 4096 if cuda else 1024
    with tempfile.TemporaryDirectory() as folder:
        sources = options.sources or make_images(Path(folder), count)
        rows = rows_of(sources, threads[:1] if options.tiny else threads, options)
    if options.needs:
        print("\n".join(closing(rows, options.needs)))
    if options.tiny:
        return rows
    if not cuda:
        first = rows[0]["images_per_second"]
        dropped = ("images_per_second", "threads_needed")
        ratios = [{key: value for key, value in row.items() if key not in dropped} for row in rows]
        for ratio, row in zip(ratios, rows, strict=True):
            ratio["ratio"] = row["images_per_second"] / first
        record.write("data_cpu", ratios)
    return rows


if __name__ == "__main__":
    main()
