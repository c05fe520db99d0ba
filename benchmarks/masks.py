"""Speed of drawing and packing masks, extension against PyTorch: ``python -m benchmarks.masks [--tiny]``.

256 images of 14 x 14 patches, sample + complement + full, one prefix token. On the CPU, ratios (PyTorch's time over
the extension's) with one thread and with all; on a GPU also microseconds per call between CUDA events, host time
included. PyTorch only draws, also in the ratio of draw and pack. Writes `benchmarks/results/masks.json`.
"""

import statistics
import time
from collections.abc import Callable

import torch

import fastalign as fa
from benchmarks import record
from benchmarks.timing import timed
from fastalign.ops import extension

KINDS = {"uniform": fa.UniformMasks(), "bernoulli": fa.BernoulliMasks(), "blockwise": fa.BlockwiseMasks()}
IMAGES, GRID, PREFIX = 256, (14, 14), 1
REPEATS, WARM_UP = 50, 5


def functions(kind: str, device: str, images: int) -> dict[str, Callable[[], object]]:
    """The timed functions: drawing in PyTorch, in the extension, and drawing and packing in one call."""
    masks, ids = KINDS[kind], torch.arange(images, device=device)
    return {
        "pytorch": lambda: masks.eager(ids, GRID),
        "draw": lambda: masks(ids, GRID),
        "draw_and_pack": lambda: masks.packed(ids, GRID, PREFIX),
    }


def measure(kind: str, device: str, threads: int, images: int, repeats: int) -> dict:
    """One row: ratios of times, and on a GPU the times."""
    torch.set_num_threads(threads)
    seconds = {}
    for name, function in functions(kind, device, images).items():
        times = timed(function, repeats + WARM_UP, device, time.perf_counter)
        seconds[name] = statistics.median(times[WARM_UP:])
    row = {"kind": kind, "device": device, "threads": threads, "images": images, "patches": GRID[0] * GRID[1]}
    row |= {f"{name}_speedup": seconds["pytorch"] / seconds[name] for name in ("draw", "draw_and_pack")}
    if device == "cuda":
        row |= {f"{name}_us": 1e6 * value for name, value in seconds.items()}
    return row


def main(arguments: list[str] | None = None) -> list[dict]:
    """Measure, print, write."""
    tiny = record.parser("masks", __doc__, "eight images, two calls").parse_args(arguments).tiny
    all_threads, rows = torch.get_num_threads(), []
    places = [("cpu", threads) for threads in sorted({1, all_threads})]
    if torch.cuda.is_available():
        places.append(("cuda", all_threads))
    for device, threads in places:
        if not extension.available(torch.device(device)):
            print(f"nothing to compare on {device}: extension {extension.status()}")
            continue
        for kind in KINDS:
            rows.append(measure(kind, device, threads, 8 if tiny else IMAGES, 2 if tiny else REPEATS))
            times = "".join(f"  {key[:-3]} {rows[-1][key]:.1f} us" for key in rows[-1] if key.endswith("_us"))
            line = "{device:5} {threads:3} threads {kind:10} draw {draw_speedup:6.1f}x  draw and pack "
            print((line + "{draw_and_pack_speedup:6.1f}x").format(**rows[-1]) + times, flush=True)
    torch.set_num_threads(all_threads)
    if rows and not tiny:
        record.write("masks", rows)
    return rows


if __name__ == "__main__":
    main()
