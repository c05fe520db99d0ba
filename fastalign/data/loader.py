"""Batches for one rank, made ahead of time by a background thread.

Who gets what is decided here and is a pure function of (seed, epoch, micro-step, rank); DALI only decodes.
"""

import contextlib
import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from fastalign.data.augment import augment, mix
from fastalign.data.bad_samples import BadSample, BadSamples
from fastalign.data.batches import BatchDecoder, Work
from fastalign.data.fetch import Fetched, Fetcher, refuse_rows
from fastalign.data.prefetch import Batch, Prefetcher
from fastalign.data.sources import Source, SyntheticSource
from fastalign.data.transforms import Transform, normalize, reflect
from fastalign.utils.errors import UserError
from fastalign.utils.random import EVAL_EPOCH, permutation

_READ_AHEAD = 2


class Loader:
    """Micro-batches of a source for one rank.

    Training draws a new global permutation each epoch; of it, micro-step m of rank r takes the b samples from
    (m * world_size + r) * b on. An epoch has (n // (world_size * b * accumulate)) * accumulate micro-steps: what
    does not fill an update is left out, other samples each epoch. Evaluation goes through the source in order,
    every sample once: the last batches are smaller, and ranks may have different numbers of them.

    Bad samples (unreadable, refused by `headers.inspect`, not decodable by DALI) are an error, unless `bad` is given:
    then training takes the next good sample in source order instead, with the crops and masks of that sample, and
    evaluation leaves them out; a batch without a good one is not handed over. 100 in a row are an error.

    Args:
        source: the data set.
        transform: image to input.
        batch_size: b, samples a micro-batch of this rank.
        device: where batches come out. On CUDA, JPEGs are decoded there.
        dtype: of the images.
        seed: of the run; decides order and augmentation.
        rank: of this process.
        world_size: number of ranks.
        train: shuffle and drop the remainder, or go through once in order.
        accumulate: micro-batches an update.
        threads: reading threads, and as many for decoding.
        prefetch: finished batches kept ready.
        hw_decoder_load: see `Decoder`.
        mixup: alpha, 0 is off. Training only, as is cutmix. Both pair the samples of this rank's batch, so, unlike
            the rest, their pixels depend on batch_size and world_size.
        cutmix: alpha, 0 is off.
        bad: what is known of bad samples; it grows. None: the first one is an error.

    Raises:
        UserError: a bad argument, or a training set smaller than one update.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        *,
        batch_size: int,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        train: bool = True,
        accumulate: int = 1,
        threads: int = 4,
        prefetch: int = 2,
        hw_decoder_load: float = 0.9,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        bad: BadSamples | None = None,
    ):
        counts = {
            "batch_size": batch_size,
            "accumulate": accumulate,
            "threads": threads,
            "prefetch": prefetch,
        }
        for name, value in counts.items():
            if value < 1:
                raise UserError(f"{name}={value}: it must be at least 1")
        if not 0 <= rank < world_size:
            raise UserError(f"rank={rank} is not in 0..{world_size - 1} (world_size={world_size})")
        if min(mixup, cutmix) < 0:
            raise UserError(f"mixup={mixup}, cutmix={cutmix}: alpha must be 0 (off) or more")
        if (mixup or cutmix) and not train:
            raise UserError("mixup and cutmix are for training; set both to 0 for evaluation")
        update = world_size * batch_size * accumulate
        if train and len(source) < update:
            raise UserError(
                f"the data set has {len(source)} images, one update takes {update} ({world_size} ranks x "
                f"batch size {batch_size} x accumulate {accumulate}); lower the batch size or add images"
            )
        self.source, self.transform, self.train = source, transform, train
        self.device, self.dtype, self.seed = torch.device(device), dtype, seed
        if self.device.type == "cuda" and self.device.index is None:
            # The current device is a thread's own: in the background thread it is GPU 0.
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._batch, self._rank, self._world, self._accumulate = batch_size, rank, world_size, accumulate
        self._threads, self._prefetch, self._hw_decoder_load = threads, prefetch, hw_decoder_load
        self._mixup, self._cutmix = mixup, cutmix
        self.bad, self._fetcher = bad, Fetcher(source, bad, replace=train)
        self._pool: ThreadPoolExecutor | None = ThreadPoolExecutor(
            threads, thread_name_prefix="fastalign-read"
        )
        self._decoder: BatchDecoder | None = None
        self._active: weakref.ref[Prefetcher] | None = None

    def __len__(self) -> int:
        """Micro-batches an epoch on this rank."""
        total, stride = len(self.source), self._world * self._batch
        if self.train:
            return total // (stride * self._accumulate) * self._accumulate
        return max(0, -(-(total - self._rank * self._batch) // stride))

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """The micro-batches of an epoch. Work starts at once; an earlier iterator of this loader is closed.

        Args:
            epoch: decides order and augmentation; without effect in evaluation.
            start: first micro-batch, to resume inside an epoch: the tail is the same as in a whole epoch.

        Returns:
            An iterator with a `close` method; dropping it stops the work too.
        """
        if self._pool is None:
            raise RuntimeError("this loader is closed")
        if not (0 <= start <= len(self) and 0 <= epoch < EVAL_EPOCH):
            raise ValueError(
                f"start={start} is not in 0..{len(self)}, or epoch={epoch} not in 0..{EVAL_EPOCH - 1}"
            )
        self._stop_active()
        iterator = Prefetcher(
            self._generate(epoch if self.train else EVAL_EPOCH, start), self.device, self._prefetch
        )
        self._active = weakref.ref(iterator)
        return iterator

    def close(self) -> None:
        """Stops all threads. The source stays open: it is the caller's."""
        self._stop_active()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
        self._decoder = None

    def _stop_active(self) -> None:
        active = self._active() if self._active is not None else None
        if active is not None:
            active.close()
        self._active = None

    def __del__(self):
        # No work runs any more, it would hold this object. Joining is not possible where the last reference goes
        # away in a thread of the pool, and an iterator that outlives its loader still has batches to hand over.
        if getattr(self, "_pool", None) is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _ids(self, epoch: int, start: int) -> Iterator[np.ndarray]:
        total, stride = len(self.source), self._world * self._batch
        order = permutation(total, seed=self.seed, epoch=epoch) if self.train else np.arange(total)
        for step in range(start, len(self)):
            first = step * stride + self._rank * self._batch
            yield np.ascontiguousarray(order[first : first + self._batch], dtype=np.int64)

    def _generate(self, epoch: int, start: int) -> Iterator[Batch]:
        """Runs in the background thread."""
        if isinstance(self.source, SyntheticSource):
            for ids in self._ids(epoch, start):
                place, size = torch.from_numpy(ids).to(self.device), self.transform.size
                images = self.source.images(place, size, seed=self.seed, dtype=self.dtype)
                yield self._mixed(images, ids, epoch)
            return
        decoder = self._open_decoder()
        try:
            with contextlib.closing(self._read_ahead(epoch, start)) as reads:
                yield from self._decoded(decoder, reads, epoch)
        finally:
            # A consumer that leaves early leaves a batch in flight, which the next epoch must not find.
            decoder.drain()

    def _decoded(self, decoder: BatchDecoder, reads: Iterator, epoch: int) -> Iterator[Batch]:
        """While DALI works on a batch, the one before it is finished and handed over."""
        running: Work | None = None
        failure: Exception | None = None
        row: list[BadSample] = []
        bad: list[BadSample] = []
        while True:
            try:
                fetched = next(reads, None)
                work = decoder.prepare(fetched, epoch) if fetched else None
            except Exception as error:
                # The batches before the bad one are good: the consumer gets them first.
                work, failure = None, error
            if running:
                running, pixels = decoder.collect(running)
            if work:
                decoder.submit(work)
            if running:
                for made in running.fetched:
                    row = row + made.bad if made.encoded is None else []
                    refuse_rows(row)
                    bad += made.bad
                if running.encoded:
                    yield self._finish(running, pixels, epoch, tuple(dict.fromkeys(bad)))
                    bad = []
            running = work
            if running is None:
                break
        if failure:
            raise failure

    def _read_ahead(self, epoch: int, start: int) -> Iterator[list[Fetched]]:
        waiting: deque[list[Future]] = deque()
        remaining = self._ids(epoch, start)
        try:
            while True:
                while len(waiting) <= _READ_AHEAD and (ids := next(remaining, None)) is not None:
                    parts = np.array_split(ids, min(self._threads, len(ids)))
                    waiting.append([self._pool.submit(self._read, part.tolist()) for part in parts])
                if not waiting:
                    return
                yield [made for part in waiting.popleft() for made in part.result()]
        finally:
            for parts in waiting:
                for part in parts:
                    part.cancel()

    def _read(self, ids: list[int]) -> list[Fetched]:
        return [self._fetcher.fetch(i) for i in ids]

    def _open_decoder(self) -> BatchDecoder:
        if self._decoder is None:
            self._decoder = BatchDecoder(
                self.transform,
                self._fetcher,
                seed=self.seed,
                tolerant=self.bad is not None,
                batch_size=self._batch,
                device=self.device,
                threads=self._threads,
                hw_decoder_load=self._hw_decoder_load,
            )
        return self._decoder

    def _finish(self, work: Work, pixels: Tensor, epoch: int, bad: tuple[BadSample, ...]) -> Batch:
        pixels = reflect(pixels, work.sampling)
        pixels = augment(pixels, self.transform, work.ids, seed=self.seed, epoch=epoch)
        return self._mixed(normalize(pixels, self.transform, self.dtype), work.ids, epoch, bad)

    def _mixed(self, images: Tensor, ids: np.ndarray, epoch: int, bad: tuple[BadSample, ...] = ()) -> Batch:
        mixed = {"mixup": self._mixup, "cutmix": self._cutmix, "seed": self.seed, "epoch": epoch}
        images, weight = mix(images, ids, **mixed)
        place = torch.from_numpy(ids).to(self.device)
        if self.device.type == "cuda":
            # Waiting here, off the training thread, is what makes DALI's buffers safe to reuse.
            torch.cuda.current_stream(self.device).synchronize()
        return Batch(images, place, ids, 0.0, weight, bad)
