"""Checks every image of a data set: ``fastalign scan DATA [--output quarantine.jsonl]``.

An image is good if training could use it: the header check and DALI's decoder on the CPU decide. The list that it
writes is what `faults.quarantine` reads. The exit code is 0 whether or not images are bad, and 2 for bad input.
"""

import argparse
import os
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from fastalign.data.bad_samples import BadSample, BadSamples, to_line
from fastalign.data.pipeline import Decoder, SampleReader
from fastalign.data.sources import SyntheticSource, open_source
from fastalign.data.transforms import Transform
from fastalign.training.command import run_command
from fastalign.utils.errors import UserError
from fastalign.utils.files import wrap_io_errors, write_atomically
from fastalign.utils.paths import path_argument


def scan(data: str, workers: int) -> tuple[int, list[BadSample]]:
    """The number of images, and damaged shards followed by the bad images in source order."""
    source, local = open_source(data, damaged=True), threading.local()
    if isinstance(source, SyntheticSource):
        raise UserError(f"{data} is made on the device: there is no file to check")
    reader = SampleReader(source, BadSamples(), replace=False)
    pixel = Transform((1, 1), mean=(0.0,) * 3, std=(1.0,) * 3, crop_pct=1e-3)  # decodes all, resizes little

    def check(ids: range) -> list[BadSample]:
        if not hasattr(local, "decoder"):
            local.decoder = Decoder(pixel, batch_size=1, device=torch.device("cpu"), threads=1)
        return [bad for i in ids for bad in reader.decode(reader.read(i), local.decoder)[0].bad]

    total, shown = len(source), 0.0
    bad = [BadSample(None, name, reason) for name, reason in source.damaged]
    chunk = max(64, total // 50_000)
    chunks = [range(first, min(first + chunk, total)) for first in range(0, total, chunk)]
    with ThreadPoolExecutor(workers) as pool:
        for ids, found in zip(chunks, pool.map(check, chunks), strict=True):
            bad += found
            if ids.stop / total >= shown + 0.05:
                shown = ids.stop / total
                count = len(bad) - len(source.damaged)
                print(f"{ids.stop} of {total} images checked, {count} bad", file=sys.stderr, flush=True)
    return total, bad


def _summary(data: str, total: int, bad: list[BadSample], output: Path | None) -> list[str]:
    images = [sample for sample in bad if sample.id is not None]
    lines = [f"{data}: {total} images, {len(images)} bad ({len(images) / total:.2%})"]
    kinds: dict[str, list[BadSample]] = {}
    for sample in images:
        # Numbers and contents differ from image to image.
        kinds.setdefault(re.sub(r"\d+|begins with .*", "", sample.reason), []).append(sample)
    for alike in sorted(kinds.values(), key=len, reverse=True):
        lines.append(f"  {len(alike)} x {alike[0].reason} (such as {alike[0].name!r})")
    lines += [f"  incomplete: {sample.name!r}, {sample.reason}" for sample in bad if sample.id is None]
    if output:
        lines.append(f"quarantine list: {output}; train with faults.quarantine={output}")
    elif bad:
        lines.append("add --output quarantine.jsonl for the list that faults.quarantine reads")
    return lines


def _run(options: argparse.Namespace) -> None:
    if options.workers < 1:
        raise UserError(f"--workers {options.workers}: it must be at least 1")
    output = Path(options.output) if options.output else None
    if output:  # before hours of checking, not after
        with wrap_io_errors(output):
            output.parent.mkdir(parents=True, exist_ok=True)
            output.open("ab").close()
    total, bad = scan(options.data, options.workers)
    if output:
        write_atomically(output, lambda file: file.writelines(map(to_line, bad)))
    print("\n".join(_summary(options.data, total, bad, output)))


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns the exit code: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="fastalign scan", description="Check every image of a data set, as training would."
    )
    add, cores = parser.add_argument, len(os.sched_getaffinity(0))
    add("data", type=path_argument, help="a folder of images, tar shards or a pattern of them, as data.train")
    add("--output", type=path_argument, metavar="FILE", help="write the bad ones here, for faults.quarantine")
    add("--workers", type=int, default=cores, metavar="N", help="threads (one per core)")
    options = parser.parse_args(arguments)
    return run_command(lambda: _run(options))


if __name__ == "__main__":
    sys.exit(main())
