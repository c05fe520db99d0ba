"""Batches for one rank, made ahead of time by a background thread.

Which rank gets which sample is decided here and is a function of (seed, epoch, micro-step, rank).
"""

import itertools
import time
import weakref
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fastalign.data.augment import augment, mix
from fastalign.data.pipeline import (
    BadSample,
    BadSamples,
    Decoded,
    DecodeError,
    Decoder,
    Sample,
    SampleReader,
    check_in_a_row,
)
from fastalign.data.sources import Source, SyntheticSource
from fastalign.data.transforms import Transform, normalize, reflect
from fastalign.utils.random import EVAL_EPOCH, permutation

_READ_AHEAD, _PREFETCH = 2, 2  # batches that are read, and batches that are finished, ahead of time
_side_stream = lru_cache(torch.cuda.Stream)  # one for all loaders: freed memory stays with its stream


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch."""

    images: Tensor  # [b, 3, h, w], normalized, on the loader's device
    ids: Tensor  # of the samples: [b] int64, on the host
    wait: float = 0.0  # seconds that the consumer waited for it
    weight: float = 1.0  # share of the batch's own images in mixup or cutmix; the rest is the batch reversed
    bad: tuple[BadSample, ...] = ()  # met while making it, without quarantined ones


def _prefetch(batches: Generator[Batch], device: torch.device) -> Generator[Batch]:
    """The batches, made ahead by a background thread (on CUDA, on a side stream); `close` stops it and waits for it.

    The first `next` starts the thread and returns None.
    """
    stream = _side_stream(device) if device.type == "cuda" else None

    def make() -> Batch | None:
        with torch.cuda.stream(stream) if stream else nullcontext():
            return next(batches, None)

    pool = ThreadPoolExecutor(1, "fastalign-loader")
    ready = deque(pool.submit(make) for _ in range(_PREFETCH + 1))
    try:
        yield None
        while True:
            begin = time.perf_counter()
            if (batch := ready.popleft().result()) is None:
                return
            ready.append(pool.submit(make))
            if stream:
                # The allocator must not give this memory to the side stream before the consumer's work on it is done.
                batch.images.record_stream(torch.cuda.current_stream(device))
            yield replace(batch, wait=time.perf_counter() - begin)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        batches.close()


class Loader:
    """Micro-batches of a source for one rank.

    Training draws a new global permutation each epoch; micro-step m of rank r takes b samples of it, starting at
    (m * world_size + r) * b. Samples that do not fill an update are left out, different ones each epoch. Evaluation
    reads the source once, in order; ranks may have different numbers of batches.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        *,
        batch_size: int,  # b, samples per micro-batch of this rank
        device: torch.device | str,  # of the images; on CUDA, JPEGs are decoded there
        dtype: torch.dtype = torch.float32,  # of the images
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        train: bool = True,
        accumulate: int = 1,
        threads: int = 4,  # for reading, and as many for decoding
        # Share of JPEGs for the GPU's hardware decoder. Between 0 and 1 two decoders share a batch, and their pixels
        # may differ by a level.
        hw_decoder_load: float = 0.9,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        bad: BadSamples | None = None,  # known ones; new ones are added. None: the first one raises
    ):
        self.source, self.transform, self.train, self.bad = source, transform, train, bad
        self.device, self.dtype, self.seed = torch.device(device), dtype, seed
        if self.device.type == "cuda" and self.device.index is None:
            # The current device is a property of the thread: in the background thread it is GPU 0.
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._batch, self._rank, self._world, self._accumulate = batch_size, rank, world_size, accumulate
        self._mixing = {"mixup": mixup, "cutmix": cutmix, "seed": seed}
        self._reader = SampleReader(source, bad, replace=train)
        self._pool = ThreadPoolExecutor(threads, "fastalign-read")
        synthetic = isinstance(source, SyntheticSource)
        options = {"batch_size": batch_size, "num_threads": threads}
        self._decoder = None if synthetic else Decoder(transform, self.device, hw_decoder_load, **options)
        self._active = lambda: None

    def __len__(self) -> int:
        """Micro-batches per epoch on this rank."""
        total, stride = len(self.source), self._world * self._batch
        if self.train:
            return total // (stride * self._accumulate) * self._accumulate
        return max(0, -(-(total - self._rank * self._batch) // stride))

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """The micro-batches of an epoch from `start` on, as an iterator with a `close` method.

        Work starts at once; an earlier iterator of this loader is closed. Evaluation ignores `epoch`.
        """
        self._stop_active()
        iterator = _prefetch(self._generate(epoch if self.train else EVAL_EPOCH, start), self.device)
        next(iterator)
        self._active = weakref.ref(iterator)
        return iterator

    def close(self) -> None:
        """Stop all threads. The source stays open."""
        self._stop_active()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._decoder = None

    def _stop_active(self) -> None:
        if active := self._active():
            active.close()

    def _ids(self, epoch: int, start: int) -> Iterator[np.ndarray]:
        total, stride = len(self.source), self._world * self._batch
        order = permutation(total, seed=self.seed, epoch=epoch) if self.train else np.arange(total)
        for step in range(start, len(self)):
            first = step * stride + self._rank * self._batch
            yield order[first : first + self._batch]

    def _generate(self, epoch: int, start: int) -> Generator[Batch]:
        """Runs in the background thread."""
        if self._decoder is None:
            for ids in self._ids(epoch, start):
                place = torch.from_numpy(ids).to(self.device)
                images = self.source.images(place, self.transform.size, seed=self.seed, dtype=self.dtype)
                yield self._finish(images, ids, epoch, [])
            return
        try:
            yield from self._decode(self._read_ahead(epoch, start), epoch)
        finally:
            # A consumer that stops early leaves a batch in flight. At exit, DALI destroys its pipelines before this.
            with suppress(DecodeError, AttributeError):
                self._decoder.collect()
            self._synchronize()

    def _read_ahead(self, epoch: int, start: int) -> Iterator[list[Sample]]:
        reads = (self._pool.map(self._reader.read, ids.tolist()) for ids in self._ids(epoch, start))
        waiting = deque(itertools.islice(reads, _READ_AHEAD + 1))
        while waiting:
            yield list(waiting.popleft())
            waiting.extend(itertools.islice(reads, 1))

    def _decode(self, reads: Iterator[list[Sample]], epoch: int) -> Iterator[Batch]:
        """While DALI decodes a batch, the previous one is finished and delivered."""
        running: list[Sample] = []
        in_a_row: list[BadSample] = []
        bad: list[BadSample] = []
        for samples in itertools.chain(reads, [[]]):
            done, decoded = self._collect(running, epoch)
            self._decoder.submit(samples, seed=self.seed, epoch=epoch)
            for sample in done:
                in_a_row = in_a_row + sample.bad if sample.encoded is None else []
                check_in_a_row(in_a_row)
                bad += sample.bad
            if decoded:
                ids = np.array([sample.id for sample in done if sample.encoded is not None])
                pixels = torch.cat([reflect(*each) for each in decoded])
                pixels = augment(pixels, self.transform, ids, seed=self.seed, epoch=epoch)
                yield self._finish(normalize(pixels, self.transform, self.dtype), ids, epoch, bad)
                bad = []
            running = samples

    def _collect(self, samples: list[Sample], epoch: int) -> tuple[list[Sample], Decoded]:
        """The submitted samples and their pixels. If DALI fails, bad samples are found, and replaced or left out."""
        try:
            return samples, self._decoder.collect()
        except DecodeError:
            done, decoded = [], []
        torch.cuda.empty_cache()  # the batch may have failed for lack of memory, which torch keeps from DALI
        for sample in samples:  # one by one, which takes less memory and finds the bad ones
            used, found = self._reader.decode(sample, self._decoder, seed=self.seed, epoch=epoch)
            done.append(used)
            decoded += [(pixels.clone(), sampling) for pixels, sampling in found]
            self._synchronize()
        return done, decoded

    def _finish(self, images: Tensor, ids: np.ndarray, epoch: int, bad: list[BadSample]) -> Batch:
        images, weight = mix(images, ids, epoch=epoch, **self._mixing)
        batch = Batch(images, torch.from_numpy(ids), weight=weight, bad=tuple(dict.fromkeys(bad)))
        self._synchronize()
        return batch

    def _synchronize(self) -> None:
        """Wait for the device, in the background thread: DALI reuses its buffers afterwards."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
