"""Check every image of a data set: ``fastalign scan DATA [--output quarantine.jsonl]``.

An image is good if training could use it: the header check and DALI's decoder on the CPU decide. `faults.quarantine`
reads the list that this command writes. The exit code is 0 whether or not images are bad, and 2 for bad input.
"""

import argparse
import os
import re
import sys
import tempfile
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from fastalign.data.pipeline import BadSample, BadSamples, Decoder, SampleReader, to_line
from fastalign.data.sources import Source, SyntheticSource, open_source
from fastalign.data.transforms import Transform
from fastalign.training.command import run_command
from fastalign.utils.errors import UserError
from fastalign.utils.files import path_argument, wrap_io_errors, write_atomically

_CHUNK = 64  # images per task


def scan(source: Source, workers: int) -> list[BadSample]:
    """The bad images in source order."""
    reader, local = SampleReader(source, BadSamples(), replace=False), threading.local()
    pixel = Transform((1, 1), mean=(0.0,) * 3, std=(1.0,) * 3, crop_pct=1e-3)  # resizes as little as possible
    bad: list[BadSample] = []

    def check(first: int) -> list[BadSample]:
        if not hasattr(local, "decoder"):
            local.decoder = Decoder(pixel, torch.device("cpu"), batch_size=1, num_threads=1)
        ids = range(first, min(first + _CHUNK, len(source)))
        return [bad for i in ids for bad in reader.decode(reader.read(i), local.decoder)[0].bad]

    with ThreadPoolExecutor(workers) as pool:
        starts = range(0, len(source), _CHUNK)
        for number, found in enumerate(pool.map(check, starts), 1):
            bad += found
            if 20 * number // len(starts) > 20 * (number - 1) // len(starts):
                print(f"{number / len(starts):.0%} checked, {len(bad)} bad", file=sys.stderr, flush=True)
    return bad


def _run(options: argparse.Namespace) -> None:
    if options.workers < 1:
        raise UserError(f"--workers {options.workers}: it must be at least 1")
    output = Path(options.output) if options.output else None
    source = open_source(options.data, allow_damaged=True)
    if isinstance(source, SyntheticSource):
        raise UserError(f"{options.data} has no files to check: give a folder of images or tar shards")
    if output:  # fail before hours of checking, not after
        with wrap_io_errors(output):
            output.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=output.parent).close()
        if output.is_dir():
            raise UserError(f"--output {output} is a directory; name a file")
    bad, total = scan(source, options.workers), len(source)
    print(f"{options.data}: {total} images, {len(bad)} bad ({len(bad) / total:.2%})")
    kinds: dict[str, list[BadSample]] = defaultdict(list)
    for sample in bad:  # numbers and contents differ from image to image
        kinds[re.sub(r"\d+|begins with .*", "", sample.reason)].append(sample)
    for samples in sorted(kinds.values(), key=len, reverse=True):
        print(f"  {len(samples)} x {samples[0].reason} (such as {samples[0].name!r})")
    for name, reason in source.damaged:
        print(f"  incomplete: {name!r}, {reason}")
    shards = [BadSample(None, name, reason) for name, reason in source.damaged]
    if output:
        write_atomically(output, lambda file: file.writelines(map(to_line, [*shards, *bad])))
        print(f"quarantine list: {output}; train with faults.quarantine={output}")
    elif bad or shards:
        print("add --output quarantine.jsonl for the list that faults.quarantine reads")


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns the exit code: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="fastalign scan", description="Check every image of a data set, as training would."
    )
    add, cores = parser.add_argument, len(os.sched_getaffinity(0))
    add("data", type=path_argument, help="a folder of images, tar shards or a pattern of them, as data.train")
    add("--output", type=path_argument, metavar="FILE", help="write the list for faults.quarantine")
    add("--workers", type=int, default=cores, metavar="N", help="number of threads (default: one per core)")
    return run_command(lambda: _run(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
